"""The plan as a table for people, with the arithmetic behind each number."""

from resnet_dist.plan import TRAIN_ERROR_WARMUP_FACTOR, TRAIN_ERROR_WINDOW_STEPS, Plan

NO_DATA = "unknown (planned without the data)"


def describe_plan(
    plan: Plan, decoding: str = "chosen when training starts", classes: str = NO_DATA
) -> str:
    """Returns the plan as a table with the arithmetic behind each number.

    decoding: how images are decoded, and the reason. classes: how many, and some names.
    """
    optim, batch = plan.optim, plan.global_batch_size
    per_rank = f"{batch // plan.world_size}" + (
        f" or {batch // plan.world_size + 1}" if batch % plan.world_size else ""
    )
    passes = plan.world_size * plan.accumulation
    per_pass = f"{batch // passes}" + (f" or {batch // passes + 1}" if batch % passes else "")
    val = NO_DATA if plan.val_images is None else f"{plan.val_images:,}"
    rows = [
        ("ranks", f"{plan.world_size}"),
        ("images", f"{plan.train_images:,} train, {val} val"),
        ("classes", classes),
        ("decoding", decoding),
        ("global batch", f"{batch} = {per_rank} on each of {plan.world_size} ranks"),
        ("per-rank batch", f"{per_pass} images per pass"),
        ("accumulation", f"{plan.accumulation} x forward and backward per step"),
        ("BN batch", _describe_bn(plan, per_pass)),
        (
            "steps per epoch",
            f"{plan.steps_per_epoch:,} = {plan.train_images:,} // {batch} "
            f"({plan.dropped_images_per_epoch} images dropped, different ones in each epoch)",
        ),
        (
            "total steps",
            f"{plan.total_steps:,} = {plan.epoch_at(plan.total_steps):g} epochs",
        ),
        ("warm-up", _describe_warmup(plan)),
        ("peak lr", f"{plan.peak_lr:g} = {optim.base_lr:g} * {batch} / 256"),
        ("schedule", _describe_schedule(plan)),
        (
            "evaluation",
            f"every {plan.eval_every_steps:,} steps "
            f"({plan.epoch_at(plan.eval_every_steps):g} epochs) and at the end",
        ),
        ("checkpoints", f"every {plan.save_every_steps:,} steps and at the end"),
        ("kept", _describe_kept(plan)),
    ]
    return "\n".join(f"{name:<16} {text}" for name, text in rows)


def _describe_bn(plan: Plan, per_pass: str) -> str:
    if plan.bn_ranks == 0:
        return "none: the network has no BN"
    return (
        f"{plan.bn_batch_size} images = {per_pass} per pass x {plan.bn_ranks} ranks "
        f"(model.sync_batchnorm={plan.sync_batchnorm})"
    )


def _describe_kept(plan: Plan) -> str:
    kept = f"the last {plan.keep_checkpoints}, the best"
    if plan.keep_every_steps is None:
        return kept
    return f"{kept}, and every {plan.keep_every_steps:,} steps for good"


def _describe_warmup(plan: Plan) -> str:
    limit_pct = plan.optim.warmup_until_train_error_pct
    if limit_pct is not None:
        return (
            f"lr {plan.peak_lr * TRAIN_ERROR_WARMUP_FACTOR:g} until the training error is "
            f"below {limit_pct:g} % over {TRAIN_ERROR_WINDOW_STEPS} steps"
        )
    return f"{plan.warmup_steps:,} steps = {plan.epoch_at(plan.warmup_steps):g} epochs"


def _describe_schedule(plan: Plan) -> str:
    optim = plan.optim
    if optim.schedule == "step":
        at = ", ".join(f"{m:,} ({plan.epoch_at(m):g})" for m in plan.milestone_steps)
        return f"step: times {optim.gamma:g} at steps (epochs) {at}"
    if optim.schedule == "plateau":
        patience = optim.plateau_patience_evals
        return f"plateau: times {optim.gamma:g} after {patience} evaluations without a new best"
    if optim.schedule == "polynomial":
        return f"polynomial: to 0 with power {optim.power:g}"
    return "cosine: to 0"
