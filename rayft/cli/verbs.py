"""One short function per verb, its imports inside, so that `rayft --help` answers at once.

What a function's docstring says is the help of its verb.
"""

from __future__ import annotations

import argparse
import json
import os

from rayft.errors import JobError


def run(args: argparse.Namespace) -> int:
    """Train: start a run, or resume the one of that name."""
    from rayft.fleet.version import refuse_other_version
    from rayft.spec import load_job

    refuse_other_version(os.environ)
    job = load_job(args.job, args.overrides)
    if job.tune is not None:
        from rayft.tune.run import run as run_job
    elif job.reinforced:
        from rayft.rlhf.run import run as run_job
    else:
        from rayft.train.run import run as run_job
    if job.cluster.preflight:
        from rayft.fleet.preflight import preflight_job

        return run_job(job, takeover=args.takeover, look_first=preflight_job)
    return run_job(job, takeover=args.takeover)


def tune(args: argparse.Namespace) -> int:
    """Search: find good values of a job's keys (group `tune`); start a search, or go on with the one of that name."""
    from rayft.spec import load_job

    job = load_job(args.job, args.overrides)
    if job.tune is None:
        raise JobError(
            f"{args.job} has no group `tune`, so there is nothing to search.",
            "Add one (jobs/tune_lora.yaml has an example), or use `rayft run`.",
        )
    return run(args)


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
        return compare(args.run, *args.compare, limit=args.limit, kind=args.kind)
    return browse(
        args.run,
        step=args.step,
        where=args.where,
        sort=args.sort,
        limit=args.limit,
        kind=args.kind,
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

    return submit_job(args.job, args.overrides, args.address, wait=args.wait, profile=args.profile)


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
