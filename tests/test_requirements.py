"""What is installed for CUDA 12 is what is installed for CUDA 13, but for DALI."""

import tomllib

from tests.support.paths import REPO


def test_for_cuda_12_only_dali_is_another() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    lines = (REPO / "requirements-cuda12.txt").read_text().splitlines()
    ours = [line for line in lines if not line.startswith("#")]
    assert ours == [
        requirement.replace("nvidia-dali-cuda130", "nvidia-dali-cuda120")
        for requirement in project["dependencies"]
    ]
    assert "nvidia-dali-cuda120" in ours
