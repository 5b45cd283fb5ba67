"""Names the operations of a training step that take the most time."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def profiled(step: Callable[[], Any], device: torch.device, count: int) -> dict[str, Any]:
    """Returns the number of kernel launches in a step, and the `count` GPU kernels (on a CPU,
    operators) that take the most time."""
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities, acc_events=True) as seen:
        step()
        if gpu:
            torch.cuda.synchronize(device)  # CPU-GPU sync point
    events = seen.key_averages()
    launched = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
    times = {
        event.key: (event.self_device_time_total if gpu else event.self_cpu_time_total, event.count)
        for event in events
        if (event.device_type == DeviceType.CUDA) == gpu and not event.is_user_annotation
    }
    top = sorted(times, key=lambda name: times[name], reverse=True)[:count]
    return {
        "launches": sum(e.count for e in events if e.key.startswith(launched)) if gpu else None,
        "top_kernels": [
            {"name": name[:120], "ms": round(times[name][0] / 1000, 3), "calls": times[name][1]}
            for name in top
        ],
    }
