"""The command line: one short function per verb, its imports inside, so that `rayft --help` answers at once."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from rayft.errors import EXIT_CODES, RayftError

EPILOG = "exit codes: " + " · ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items())


def run(args: argparse.Namespace) -> int:
    """Train: start a run, or resume the one of that name."""
    from rayft.fleet.version import refuse_other_version
    from rayft.spec import load_job

    refuse_other_version(os.environ)
    job = load_job(args.job, args.overrides)
    if job.reinforced:
        from rayft.rlhf.run import run as run_job
    else:
        from rayft.train.run import run as run_job
    if job.cluster.preflight:
        from rayft.fleet.preflight import preflight_job

        return run_job(job, takeover=args.takeover, look_first=preflight_job)
    return run_job(job, takeover=args.takeover)


def check(args: argparse.Namespace) -> int:
    """Look at the data as it would be trained on; no training, no GPU."""
    from rayft.spec import load_job

    job = load_job(args.job, args.overrides)
    if job.reinforced:
        from rayft.rlhf.check import check_job
    else:
        from rayft.train.inspect import check_job
    return check_job(job, samples=args.samples)


def doctor(args: argparse.Namespace) -> int:
    """Look whether model, engine, reference and rewards of a job agree where learning from rewards rests on it."""
    from rayft.rlhf.doctor import doctor as look_at
    from rayft.spec import load_job

    return look_at(load_job(args.job, args.overrides))


def plan(args: argparse.Namespace) -> int:
    """Memory per rank for every ZeRO stage, from the model's config alone; after a run also what was measured."""
    from rayft.spec import load_job
    from rayft.train.inspect import plan_job

    job = load_job(args.job, args.overrides)
    if args.profile is None:
        return plan_job(job)
    from rayft.fleet.render.run import plan_on
    from rayft.spec.profile import load_profile

    return plan_on(job, load_profile(args.profile))


def k8s_render(args: argparse.Namespace) -> int:
    """Write a job as a manifest for KubeRay, sized for the fleet of a profile; submit it with --apply."""
    from rayft.fleet.render.manifest import Wishes
    from rayft.fleet.render.run import render_job
    from rayft.spec import load_job
    from rayft.spec.profile import load_profile

    job, profile = load_job(args.job, args.overrides), load_profile(args.profile)
    return render_job(job, profile, Wishes(args.priority, args.hours), out=args.out, submit=args.apply)


def export(args: argparse.Namespace) -> int:
    """Write a run's checkpoint as Hugging Face safetensors; merges an adapter with --merge."""
    from rayft.train.finish import export_run

    return export_run(args.run, args.out, step=args.step, merge=args.merge)


def evaluate(args: argparse.Namespace) -> int:
    """Measure a model, or a run's model, on the suites of a job file."""
    from rayft.spec import load_job
    from rayft.train.inspect import evaluate_model

    return evaluate_model(load_job(args.job, args.overrides), args.model)


def score(args: argparse.Namespace) -> int:
    """Score the answers in a file with a reward model, or several."""
    from rayft.train.inspect import score_file

    return score_file(args.model, args.data, args.out)


def rate(args: argparse.Namespace) -> int:
    """Open the page on which people rate a model's answers."""
    from pathlib import Path

    from rich.console import Console

    from rayft.rate.serve import Source, serve
    from rayft.rate.server import Settings

    source = Source(
        args.answers,
        args.prompts,
        args.model,
        args.limit,
        args.samples,
        args.max_new_tokens,
        args.temperature,
        args.seed,
    )
    raters = list(dict.fromkeys(name.strip() for name in args.raters.split(",") if name.strip()))
    hosts = {*Settings.hosts, f"[{args.host}]" if ":" in args.host else args.host, *args.allow_host}
    token = args.token or os.environ.get("RAYFT_RATE_TOKEN")
    settings = Settings(raters, args.overlap, args.seed, token, sorted(hosts))
    name = next(iter(args.allow_host), None)
    folder, console = Path(args.folder), Console()
    return serve(folder, source, settings, host=args.host, port=args.port, name=name, console=console)


def ratings(args: argparse.Namespace) -> int:
    """Show how far raters agree, and write their ratings as rows to train on."""
    from pathlib import Path

    from rich.console import Console

    from rayft.rate.serve import report

    return report(Path(args.folder), Console())


def rollouts(args: argparse.Namespace) -> int:
    """Look at the answers that a run learned from: browse, filter, compare two steps, replay one."""
    if args.replay is not None:
        from rayft.rlhf.replay import replay

        return replay(args.run, args.replay)
    from rayft.rlhf.browse import browse, compare

    if args.compare:
        return compare(args.run, *args.compare, limit=args.limit, held_out=args.held_out)
    return browse(
        args.run,
        step=args.step,
        where=args.where,
        sort=args.sort,
        limit=args.limit,
        held_out=args.held_out,
    )


def usage(args: argparse.Namespace) -> int:
    """Show GPU-hours and where they went, by run, user or team, from the logs in run folders."""
    from rayft.report.usage_table import show_usage

    return show_usage(args.prefix, by=args.by, since=args.since, until=args.until, as_json=args.json)


def preflight(args: argparse.Namespace) -> int:
    """Look at every node of a cluster before a run does: packages, GPUs, storage, disk, clock, network; names the bad ones."""
    from rayft.fleet.preflight import preflight_cluster
    from rayft.fleet.verdict import Limits

    limits = Limits(
        min_disk_gb=args.min_disk_gb,
        min_shm_gb=args.min_shm_gb,
        max_skew_s=args.max_skew_s,
        timeout_s=args.timeout_s,
    )
    return preflight_cluster(args.address, args.storage, limits, as_json=args.json)


def cache(args: argparse.Namespace) -> int:
    """Show what this machine keeps of remote models and data, and who uses it."""
    from rich.console import Console

    from rayft.report.node_cache import show

    return show(Console(), verify=args.verify, clear=args.clear)


def submit(args: argparse.Namespace) -> int:
    """Send a job to a Ray cluster and follow it; ends with the run's own exit code."""
    from rayft.fleet.submit import submit as submit_job

    return submit_job(args.job, args.overrides, args.address, wait=args.wait)


def resume(args: argparse.Namespace) -> int:
    """Send a run that has ended to its cluster again: the same job under the same name, from its last checkpoint."""
    from rayft.fleet.submit import resume as resume_run

    return resume_run(args.run, args.address, wait=args.wait)


def list_runs(args: argparse.Namespace) -> int:
    """List the runs that were submitted to a cluster, with their attempts."""
    from rayft.fleet.show import show_list

    return show_list(args.address)


def status(args: argparse.Namespace) -> int:
    """Show where a submitted run stands."""
    from rayft.fleet.show import show_status

    return show_status(args.run, args.address)


def logs(args: argparse.Namespace) -> int:
    """Show what a submitted run has printed; with --follow to its end, and with its exit code."""
    from rayft.fleet.show import show_logs

    return show_logs(args.run, args.address, follow_on=args.follow)


def stop(args: argparse.Namespace) -> int:
    """Have a submitted run save and end (its code is 8); if it does not, stop its submission."""
    from rayft.fleet.stop import stop as stop_run

    return stop_run(args.run, args.address, timeout_s=args.timeout)


def schema(args: argparse.Namespace) -> int:
    """Print the JSON schema of a job file."""
    from rayft.spec import job_schema

    print(json.dumps(job_schema(), indent=2))
    return 0


def k8s_lint(args: argparse.Namespace) -> int:
    """Find what loses work or money in manifests, and what a cluster will refuse."""
    from rayft.fleet.lint.run import lint_files, show_rules

    return show_rules() if args.rules else lint_files(args.files, schemas=args.schemas)


def chat(args: argparse.Namespace) -> int:
    """Talk to a model: a folder, a hub id, or a run."""
    from rayft.generate.chat import chat as chat_with

    return chat_with(args.model, prompt=args.prompt, system=args.system, max_new_tokens=args.max_new_tokens)


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    top = argparse.ArgumentParser(
        prog="rayft",
        description="Fine-tune language models on Ray: exact, restartable, visible.",
        epilog=EPILOG,
    )
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(
        name: str, function: Callable[[argparse.Namespace], int], *, job: bool = False, of: Any = verbs
    ) -> argparse.ArgumentParser:
        summary = (function.__doc__ or "").strip()
        sub = of.add_parser(name, help=summary, description=summary)
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

    verb("run", run, job=True).add_argument(
        "--takeover", action="store_true", help="take the run over from a driver that is known to be gone"
    )
    verb("check", check, job=True).add_argument(
        "--samples", type=int, default=3, help="rows shown with their trained tokens (default 3)"
    )
    verb("doctor", doctor, job=True)
    verb("plan", plan, job=True).add_argument(
        "--profile",
        help="fleet profile: show what the run would be there, and whether a checkpoint fits its grace time",
    )
    sub = verb("export", export)
    sub.add_argument("run", help="run folder, local or s3://")
    sub.add_argument("out", help="folder or s3:// prefix to write to")
    sub.add_argument("--step", type=int, help="checkpoint to export (default: the newest)")
    sub.add_argument(
        "--merge", action="store_true", help="merge the adapter into the model, in fp32, and prove it"
    )
    verb("eval", evaluate, job=True).add_argument(
        "--model", help="model to measure instead of the job's run: folder, hub id or run folder"
    )
    sub = verb("score", score)
    sub.add_argument(
        "model", nargs="+", help="reward model: run folder, model folder or hub id; several are averaged"
    )
    sub.add_argument(
        "--data", required=True, help="file or folder of conversations, or of answers to compare"
    )
    sub.add_argument("--out", required=True, help="jsonl file to write: the rows with their scores")
    sub = verb("rate", rate)
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
    verb("ratings", ratings).add_argument("folder", help="what `rayft rate` wrote to")
    sub = verb("rollouts", rollouts)
    sub.add_argument("run", help="run folder, local or s3://")
    sub.add_argument(
        "--held-out",
        action="store_true",
        help="answers to held-out prompts (data.eval), not those trained on",
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
    sub = verb("usage", usage)
    sub.add_argument(
        "prefix", nargs="+", help="run folder, or what holds run folders (`storage`), local or s3://"
    )
    sub.add_argument("--by", choices=("run", "user", "team"), default="run")
    sub.add_argument(
        "--since", metavar="DATE", help="count from here on, such as 2026-11-01 or 2026-11-01T12:00 (UTC)"
    )
    sub.add_argument("--until", metavar="DATE", help="count up to here")
    sub.add_argument("--json", action="store_true", help="as JSON, with exact whole numbers")
    sub = verb("preflight", preflight)
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
    what = verb("cache", cache).add_mutually_exclusive_group()
    what.add_argument(
        "--verify", action="store_true", help="look at every byte, and remove what is damaged (then code 5)"
    )
    what.add_argument("--clear", action="store_true", help="remove what no process uses")
    _fleet_verbs(verb)
    verb("schema", schema)
    summary = "Manifests for KubeRay and Kueue."
    k8s = verbs.add_parser("k8s", help=summary, description=summary)
    parts = k8s.add_subparsers(dest="part", required=True, metavar="VERB")
    sub = verb("render", k8s_render, job=True, of=parts)
    sub.add_argument("--profile", required=True, help="fleet profile: a file, or a name in cluster/profiles")
    sub.add_argument("--out", help="file to write to (default: standard output)")
    sub.add_argument("--apply", action="store_true", help="upload local files and submit with kubectl")
    sub.add_argument("--priority", help="one of the profile's priorities")
    sub.add_argument("--hours", type=float, help="longest run (default: the profile's limit)")
    sub = verb("lint", k8s_lint, of=parts)
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
    sub = verb("chat", chat)
    sub.add_argument("model", help="model folder, hub id or run folder")
    sub.add_argument("--prompt", help="answer this and end")
    sub.add_argument("--system", help="system message")
    sub.add_argument("--max-new-tokens", type=int, default=256)
    return top


def _fleet_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    named = {"resume": resume, "status": status, "logs": logs, "stop": stop}
    subs = {"submit": verb("submit", submit, job=True), "list": verb("list", list_runs)}
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
    subs["logs"].add_argument("--follow", action="store_true", help="until the run ends")
    subs["stop"].add_argument(
        "--timeout", type=float, default=120.0, help="seconds that it has to save and end (default 120)"
    )


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError("must be from 0 to 1")
    return share


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments of a verb; overrides may also stand after options, where argparse does not look for them."""
    top = parser()
    args, rest = top.parse_known_args(argv)
    if rest and not ("overrides" in args and all("=" in word and word[0] != "-" for word in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def main(argv: list[str] | None = None) -> int:
    """Run a verb; an error becomes one sentence on stderr and its exit code."""
    args = parse(argv)
    try:
        return int(args.function(args))
    except RayftError as error:
        if args.debug:
            traceback.print_exc()
        print(f"rayft {args.verb}: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print(f"rayft {args.verb}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        print(
            f"rayft {args.verb}: a bug in rayft: {type(error).__name__}: {error}. Run it again with --debug and report what it prints.",
            file=sys.stderr,
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
