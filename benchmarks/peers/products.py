"""What oneDNN's products of a model's shapes do a second: each linear map forward (x W') and backward (dy W) at a row's tokens.

Every map counts as often as the model has it, and is computed up to three times; the head is one of them.
"""

from __future__ import annotations

import time

import torch
from stepping import Pipe, versions, work


def main() -> None:
    pipe, asked = Pipe(), work()
    m = asked["row_tokens"]
    shapes = [(times, out, inner) for times, out, inner in asked["maps"]]
    dtype = getattr(torch, asked["dtype"])
    weights = {(out, inner): torch.randn(out, inner).to(dtype) for _, out, inner in shapes}
    places = {size: torch.randn(m, size).to(dtype) for shape in weights for size in shape}
    flops = sum(4 * m * times * out * inner for times, out, inner in shapes)
    pipe.ready(by=versions("torch"), packing="", said=[], flops=flops)
    while True:
        pipe.wait()
        wall = processor = 0.0
        for times, out, inner in shapes:
            weight = weights[out, inner]
            began = (time.perf_counter(), time.process_time())
            for _ in range(repeats := min(times, 3)):
                torch.mm(places[inner], weight.t())
                torch.mm(places[out], weight)
            wall += (time.perf_counter() - began[0]) * times / repeats
            processor += (time.process_time() - began[1]) * times / repeats
        pipe.tokens = pipe.places = m
        pipe.done(took=(wall, processor))


if __name__ == "__main__":
    main()
