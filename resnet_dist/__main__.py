"""The program `resnet-dist`, also as `python -m resnet_dist`."""


def main() -> None:
    try:
        from resnet_dist import cli

        cli.main()
    except KeyboardInterrupt:  # while importing; `cli.main` itself ends without one
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
