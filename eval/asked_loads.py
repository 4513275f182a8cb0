"""The loads that the flags of `eval tpt` ask for."""

import argparse
from dataclasses import replace

from apparate_llm.eval.prompts import Prompt
from apparate_llm.eval.workloads import SLICE_S, Length, Load, closed, poisson, traced

DEFAULT_CONCURRENCY = (1, 2, 4, 8)


def asked_loads(args: argparse.Namespace, prompts: list[Prompt]) -> list[Load]:
    arrivals = next((f"--{name}" for name in ("rate", "trace") if getattr(args, name) is not None), None)
    if arrivals is not None and args.concurrency is not None:
        raise ValueError(f"give one of --concurrency and {arrivals}: clients ask when they have their answer")
    slice_s = args.slice_s or SLICE_S
    if args.trace is not None:
        if args.rate is not None:
            raise ValueError("give one of --rate and --trace: both say when requests arrive")
        if args.length is not None:
            raise ValueError("--length does not go with --trace, which sets the answers' lengths")
        if args.prompt_tokens:
            raise ValueError("--prompt-tokens does not go with --trace, which sets the prompts' lengths")
        scale, most = args.trace_scale or 1.0, args.num_requests or len(prompts)
        return [
            traced(args.trace, prompts, scale=scale, num_requests=most, max_tokens=args.max_tokens, slice_s=slice_s)
        ]
    if args.slice_s is not None and args.rate is None:
        raise ValueError("--slice-s is about arrivals (--rate, --trace), and none are given")
    for flag, given in (("--trace-scale", args.trace_scale), ("--num-requests", args.num_requests)):
        if given is not None:
            raise ValueError(f"{flag} is about a --trace, and none is given")
    lengths: tuple[Length, ...] = ("free", "fixed") if args.length == "both" else (args.length or "free",)
    loads = []
    for length in lengths:
        if args.rate is not None:
            loads += [
                poisson(len(prompts), rate, max_tokens=args.max_tokens, length=length, seed=args.seed, slice_s=slice_s)
                for rate in args.rate
            ]
        else:
            loads += [
                closed(len(prompts), number, max_tokens=args.max_tokens, length=length, seed=args.seed)
                for number in args.concurrency or DEFAULT_CONCURRENCY
            ]
    return _named_apart(loads)


def _named_apart(loads: list[Load]) -> list[Load]:
    """A load that is asked for again, as in --concurrency 1,16,1, is another one."""
    named: list[Load] = []
    for load in loads:
        key = (load.name, load.fixed_length)
        times = sum((other.name.partition(", time ")[0], other.fixed_length) == key for other in named)
        named.append(replace(load, name=f"{load.name}, time {times + 1}") if times else load)
    return named
