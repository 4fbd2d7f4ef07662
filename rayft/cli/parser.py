"""What may stand on the command line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from rayft.cli import verbs
from rayft.errors import EXIT_CODES

EPILOG = "exit codes: " + " · ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items())

#: Adds a verb: name, function, and whether it takes a job file (`job`); gives the verb's own parser.
Verb = Callable[..., argparse.ArgumentParser]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments of a verb; overrides may also stand after options, where argparse does not look for them."""
    top = parser()
    args, rest = top.parse_known_args(argv)
    if rest and not ("overrides" in args and all("=" in word and word[0] != "-" for word in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    top = argparse.ArgumentParser(
        prog="rayft",
        description="Fine-tune language models on Ray: exact, restartable, visible.",
        epilog=EPILOG,
    )
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    verb = partial(_verb, subs)
    _training(verb)
    _models(verb)
    _ratings(verb)
    _records(verb)
    _machines(verb)
    _fleet(verb)
    verb("schema", verbs.schema)
    _k8s(subs)
    _chat(verb)
    return top


def _verb(
    subs: Any, name: str, function: Callable[[argparse.Namespace], int], *, job: bool = False
) -> argparse.ArgumentParser:
    summary = (function.__doc__ or "").strip()
    sub: argparse.ArgumentParser = subs.add_parser(name, help=summary, description=summary)
    sub.set_defaults(function=function)
    # Also after the verb, where people add it.
    sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    if job:
        sub.add_argument("job", help="job file, such as jobs/demo.yaml")
        sub.add_argument(
            "overrides",
            nargs="*",
            metavar="group.key=value",
            help="values that replace those of the file",
        )
    return sub


def _training(verb: Verb) -> None:
    verb("run", verbs.run, job=True).add_argument(
        "--takeover", action="store_true", help="take the run over from a driver that is known to be gone"
    )
    verb("tune", verbs.tune, job=True).add_argument(
        "--takeover", action="store_true", help="take the search over from a driver that is known to be gone"
    )
    verb("check", verbs.check, job=True).add_argument(
        "--samples", type=int, default=3, help="rows shown with their trained tokens (default 3)"
    )
    verb("doctor", verbs.doctor, job=True)
    verb("plan", verbs.plan, job=True).add_argument(
        "--profile",
        help="fleet profile: show what the run would be there, and whether a checkpoint fits its grace time",
    )


def _models(verb: Verb) -> None:
    sub = verb("export", verbs.export)
    sub.add_argument("run", help="run folder, local or s3://")
    sub.add_argument("out", help="folder or s3:// prefix to write to")
    sub.add_argument("--step", type=int, help="checkpoint to export (default: the newest)")
    sub.add_argument(
        "--merge", action="store_true", help="merge the adapter into the model, in fp32, and prove it"
    )
    verb("eval", verbs.evaluate, job=True).add_argument(
        "--model", help="model to measure instead of the job's run: folder, hub id or run folder"
    )
    sub = verb("score", verbs.score)
    sub.add_argument(
        "model", nargs="+", help="reward model: run folder, model folder or hub id; several are averaged"
    )
    sub.add_argument(
        "--data", required=True, help="file or folder of conversations, or of answers to compare"
    )
    sub.add_argument("--out", required=True, help="jsonl file to write: the rows with their scores")


def _ratings(verb: Verb) -> None:
    sub = verb("rate", verbs.rate)
    sub.add_argument("folder", help="where items and ratings are kept; an existing one is gone on with")
    sub.add_argument(
        "--answers", help="file of prompts with ready answers (completions, or chosen and rejected)"
    )
    sub.add_argument("--prompts", help="file of prompts that the models are to answer")
    sub.add_argument(
        "--model", action="append", default=[], help="model, checkpoint or run that answers; repeatable"
    )
    sub.add_argument("--limit", type=int, help="use only the first so many rows")
    sub.add_argument("--samples", type=int, default=1, help="answers of each model to a prompt (default 1)")
    sub.add_argument("--max-new-tokens", type=int, default=256)
    sub.add_argument("--temperature", type=float, default=0.7)
    sub.add_argument(
        "--raters", default="", help="names, comma-separated; without it anybody rates everything"
    )
    sub.add_argument(
        "--overlap", type=_share, default=0.2, help="share of the items that all raters rate (default 0.2)"
    )
    sub.add_argument("--host", default="127.0.0.1", help="anything but loopback needs --token")
    sub.add_argument("--port", type=int, default=8770)
    sub.add_argument("--token", help="secret of the raters' personal links (or RAYFT_RATE_TOKEN)")
    sub.add_argument(
        "--allow-host", action="append", default=[], help="name under which raters reach the page"
    )
    sub.add_argument("--seed", type=int, default=0, help="of the order and of the answers")
    verb("ratings", verbs.ratings).add_argument("folder", help="what `rayft rate` wrote to")


def _records(verb: Verb) -> None:
    sub = verb("rollouts", verbs.rollouts)
    sub.add_argument("run", help="run folder, local or s3://")
    kind = sub.add_mutually_exclusive_group()
    kind.add_argument(
        "--held-out",
        dest="kind",
        action="store_const",
        const="held-out",
        default="step",
        help="answers to held-out prompts (data.eval), not those trained on",
    )
    kind.add_argument(
        "--dropped",
        dest="kind",
        action="store_const",
        const="dropped",
        help="answers that rl.drop_uniform_groups left out",
    )
    what = sub.add_mutually_exclusive_group()
    what.add_argument("--step", type=int, help="show answers of this step (default: a line for every step)")
    what.add_argument(
        "--compare", type=int, nargs=2, metavar=("STEP", "STEP"), help="what changed between two steps"
    )
    what.add_argument(
        "--replay",
        type=int,
        metavar="STEP",
        help="put a step through the loss again, with the weights of then",
    )
    sub.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="CONDITION",
        help="only answers such as score<0.5, ended=false or text~pattern; repeatable",
    )
    sub.add_argument("--sort", metavar="COLUMN", help="by a column such as score, or falling: --sort=-score")
    sub.add_argument("--limit", type=int, default=5, help="answers that are shown (default 5)")
    sub = verb("usage", verbs.usage)
    sub.add_argument(
        "prefix", nargs="+", help="run folder, or what holds run folders (`storage`), local or s3://"
    )
    sub.add_argument("--by", choices=("run", "user", "team"), default="run")
    sub.add_argument(
        "--since", metavar="DATE", help="count from here on, such as 2026-11-01 or 2026-11-01T12:00 (UTC)"
    )
    sub.add_argument("--until", metavar="DATE", help="count up to here")
    sub.add_argument("--json", action="store_true", help="as JSON, with exact whole numbers")


def _machines(verb: Verb) -> None:
    sub = verb("preflight", verbs.preflight)
    sub.add_argument(
        "--address",
        default=os.environ.get("RAY_ADDRESS", "auto"),
        help="auto or HEAD:6379 on a node of the cluster, ray://HEAD:10001 from outside (default: RAY_ADDRESS, else auto)",
    )
    sub.add_argument(
        "--storage", metavar="URI", help="write and read here from every node, such as s3://bucket/prefix"
    )
    sub.add_argument(
        "--min-disk-gb", type=float, default=10.0, help="free disk a node must have (default 10)"
    )
    sub.add_argument(
        "--min-shm-gb", type=float, default=1.0, help="free shared memory a node must have (default 1)"
    )
    sub.add_argument(
        "--max-skew-s", type=float, default=2.0, help="clocks may differ by this much (default 2)"
    )
    sub.add_argument(
        "--timeout-s", type=float, default=60.0, help="a node must have answered by then (default 60)"
    )
    sub.add_argument("--json", action="store_true", help="as JSON")
    what = verb("cache", verbs.cache).add_mutually_exclusive_group()
    what.add_argument(
        "--verify", action="store_true", help="look at every byte, and remove what is damaged (then code 5)"
    )
    what.add_argument("--clear", action="store_true", help="remove what no process uses")


def _fleet(verb: Verb) -> None:
    named = {"resume": verbs.resume, "status": verbs.status, "logs": verbs.logs, "stop": verbs.stop}
    subs = {"submit": verb("submit", verbs.submit, job=True), "list": verb("list", verbs.list_runs)}
    for name, function in named.items():
        subs[name] = verb(name, function)
        subs[name].add_argument("run", help="name of a run, as `rayft list` shows it")
    for sub in subs.values():
        sub.add_argument(
            "--address", metavar="URL", help="the cluster's dashboard (default: RAY_API_SERVER_ADDRESS)"
        )
    for name in ("submit", "resume"):
        subs[name].add_argument(
            "--no-wait", dest="wait", action="store_false", help="do not follow the run to its end"
        )
    subs["submit"].add_argument(
        "--profile",
        help="fleet profile: its address and storage where none is given, and whether a checkpoint fits its grace time",
    )
    subs["logs"].add_argument("--follow", action="store_true", help="until the run ends")
    subs["stop"].add_argument(
        "--timeout", type=float, default=120.0, help="seconds that it has to save and end (default 120)"
    )


def _k8s(subs: Any) -> None:
    summary = "Manifests for KubeRay and Kueue."
    k8s = subs.add_parser("k8s", help=summary, description=summary)
    parts = k8s.add_subparsers(dest="part", required=True, metavar="VERB")
    verb = partial(_verb, parts)
    sub = verb("render", verbs.k8s_render, job=True)
    sub.add_argument("--profile", required=True, help="fleet profile: a file, or a name in cluster/profiles")
    sub.add_argument("--out", help="file to write to (default: standard output)")
    sub.add_argument("--apply", action="store_true", help="upload local files and submit with kubectl")
    sub.add_argument("--priority", help="one of the profile's priorities")
    sub.add_argument("--hours", type=float, help="longest run (default: the profile's limit)")
    sub = verb("lint", verbs.k8s_lint)
    sub.add_argument(
        "files", nargs="*", metavar="FILE", help="manifests, folders, kustomizations, or - for stdin"
    )
    sub.add_argument(
        "--schemas",
        help="folder of the schemas of KubeRay and Kueue (default: RAYFT_SCHEMAS, else rayft's own)",
    )
    sub.add_argument(
        "--rules", action="store_true", help="list the rules, why they are there and where they come from"
    )


def _chat(verb: Verb) -> None:
    sub = verb("chat", verbs.chat)
    sub.add_argument("model", help="model folder, hub id or run folder")
    sub.add_argument("--prompt", help="answer this and end")
    sub.add_argument("--system", help="system message")
    sub.add_argument("--max-new-tokens", type=int, default=256)


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError("must be from 0 to 1")
    return share
