"""What a job names by local path: small files travel with the run, everything else is refused with the remedy.

Files travel as one zip that Ray unpacks on every node as the run's working directory, at the same path everywhere. It lies in
the run's folder on storage, or in the ConfigMap where storage is a volume that the submitter cannot reach.
"""

from __future__ import annotations

import hashlib
import io
import posixpath
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayft.errors import DataError, JobError
from rayft.fleet.functions import files_of_function
from rayft.fleet.render.manifest import Travelling
from rayft.fleet.render.pods import JOB_FOLDER
from rayft.fleet.render.secrets import refuse_secrets
from rayft.fleet.runs import fork_refused, on_storage, refuse_another_name
from rayft.model.locate import is_hub_id
from rayft.spec import Job, parse_job
from rayft.spec.profile import Profile
from rayft.spec.search import jobs_of_lists

#: The folder in the zip that Ray takes off.
TOP = "job"
#: The same files make the same zip, whenever they were written.
_EPOCH = (2020, 1, 1, 0, 0, 0)


@dataclass
class Packed:
    """job: with paths as the run will find them. files: name in the working directory to local file. notes: what was changed."""

    job: Job
    files: dict[str, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files.values())

    @property
    def key(self) -> str:
        """The zip's place in the run folder, by names and contents."""
        digest = hashlib.sha256()
        for name in sorted(self.files):
            content = hashlib.sha256(self.files[name].read_bytes()).hexdigest()
            digest.update(f"{name} {content}\n".encode())
        return f"files/{digest.hexdigest()[:16]}.zip"

    def zipped(self) -> bytes:
        """The files as a zip that depends on names and contents alone."""
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for name in sorted(self.files):
                entry = zipfile.ZipInfo(f"{TOP}/{name}", _EPOCH)
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, self.files[name].read_bytes())
        return out.getvalue()


def pack(job: Job, profile: Profile) -> Packed:
    """Find local files, and name them as the run will. Raises JobError, DataError for what cannot travel."""
    packed = Packed(job)
    own = _storage(job, profile, packed.notes)
    moved, said = on_storage(job, own)
    packed.notes += said
    values = moved.model_dump(mode="json")

    def model(group: dict[str, Any], key: str, where: str) -> None:
        if group.get(key) is not None:
            group[key] = _model(group[key], where, own, profile)

    def file(group: dict[str, Any], key: str, where: str) -> None:
        if group.get(key) is not None:
            group[key] = _add(Path(group[key]).expanduser(), where, packed)

    def rows(group: dict[str, Any], where: str) -> None:
        group["path"] = _rows(group["path"], where, packed, profile)

    model(values["model"], "path", "model.path")
    model(values["model"], "tokenizer", "model.tokenizer")
    file(values["model"], "chat_template", "model.chat_template")
    for kind in ("train", "eval"):
        for index, source in enumerate(values["data"].get(kind, ())):
            rows(source, f"data.{kind}.{index}.path")
    for index, suite in enumerate(values.get("eval", {}).get("suites", ())):
        rows(suite, f"eval.suites.{index}.path")
        file(suite, "schema_path", f"eval.suites.{index}.schema_path")
    for index, source in enumerate(values.get("rewards", ())):
        where = f"rewards.{index}.path"
        if source["type"] == "model":
            model(source, "path", where)
        elif source["type"] == "function":
            source["path"] = _function(source["path"], where, packed)
    _refuse_local_places(moved, own, profile)
    packed.job = parse_job({**values, "storage": own})
    for key, trial in jobs_of_lists(job) if job.tune else ():
        there = pack(trial, profile)
        refuse_another_name(key, trial, there.job)
        packed.files |= there.files
    return packed


def travelling(packed: Packed, profile: Profile) -> Travelling | None:
    """How the files travel; None without any. Raises JobError where they are too many."""
    if not packed.files:
        return None
    most = profile.limits.upload_mb * 1e6
    if packed.size > most:
        largest = max(packed.files, key=lambda name: packed.files[name].stat().st_size)
        raise JobError(
            f"The job's local files take {packed.size / 1e6:.1f} MB, and profile {profile.name} lets a job bring "
            f"{profile.limits.upload_mb:g} MB (limits.upload_mb).",
            f"Put the largest, {packed.files[largest]}, on storage and name it there.",
        )
    if profile.in_s3:
        return Travelling(f"{packed.job.storage.rstrip('/')}/{packed.job.name}/{packed.key}")
    for name, path in packed.files.items():
        refuse_secrets(path.read_bytes().decode("utf-8", "replace"), where=name)
    return Travelling(f"file://{JOB_FOLDER}/files.zip", packed.zipped())


def _storage(job: Job, profile: Profile, notes: list[str]) -> str:
    """The profile's storage, or a folder of the job's own inside it."""
    wanted, given = job.storage.rstrip("/"), profile.storage.rstrip("/")
    if wanted.startswith(f"{given}/") and posixpath.normpath(
        wanted.removeprefix("s3:/")
    ) == wanted.removeprefix("s3:/"):
        return wanted
    if wanted not in ("runs", given):
        notes.append(f"storage {wanted} is replaced by the profile's, {given}.")
    return given


def _model(path: str, where: str, own: str, profile: Profile) -> str:
    """A model that the run's nodes can read."""
    if "://" in path and not path.startswith("file://"):
        return path
    if path.startswith("package:"):
        if path.removeprefix("package:") in profile.packages:
            return path
        raise JobError(
            f"{where}: the image of profile {profile.name} is not said to hold {path} (packages).",
            "Name a hub id or an s3:// folder, or put the package into the image and into the profile.",
        )
    if _on_volume(path.removeprefix("file://"), profile) or is_hub_id(path):
        return path
    raise JobError(
        f"{where} {path} is a folder or file of this machine, and models do not travel with a job.",
        f"Copy it below {own} and name it there, or give a hub id.",
    )


def _rows(path: str, where: str, packed: Packed, profile: Profile) -> str:
    """A file or folder of rows, a hub data set or an object on storage."""
    local = Path(path.removeprefix("file://")).expanduser()
    if path.startswith("s3://") or _on_volume(path, profile):
        return path
    if local.is_file():
        return _add(local, where, packed)
    if local.is_dir():
        files = sorted(
            file for file in local.rglob("*") if file.is_file() and not _hidden(file.relative_to(local))
        )
        if files:
            names = [_add(file, where, packed, below=local) for file in files]
            first = files[0].relative_to(local).as_posix()
            return names[0].removesuffix(first).rstrip("/") or "."
    if not local.exists() and is_hub_id(path) and not local.suffix:
        return path
    raise DataError(
        f"{where}: there is no file or folder {path} here, so it cannot travel with the job.",
        "Correct the path, or name an object on storage (s3://…) or a hub data set.",
    )


def _function(path: str, where: str, packed: Packed) -> str:
    """A reward function, with the modules beside its file."""
    files = files_of_function(path, Path.cwd())
    names = [_add(file, where, packed, below=file.parent) for file in files]
    named, _, function = path.rpartition(":")
    return f"{names[0]}:{function}" if named.endswith(".py") else path


def _add(file: Path, where: str, packed: Packed, below: Path | None = None) -> str:
    """Take a file along; its name in the working directory. What lies outside of the current folder gets a folder of its own,
    named by where it lies, so that names never climb."""
    if not file.is_file():
        raise JobError(
            f"{where}: there is no file {file}.",
            "Correct the path; it is relative to where the command runs.",
        )
    here, whole = Path.cwd(), Path(posixpath.normpath(file.absolute().as_posix()))
    if whole.is_relative_to(here):
        name = whole.relative_to(here).as_posix()
    else:
        root = Path(posixpath.normpath((below or file.parent).absolute().as_posix()))
        digest = hashlib.sha256(str(below or file).encode()).hexdigest()[:8]
        name = f"outside/{digest}/{whole.relative_to(root).as_posix()}"
    packed.files[name] = file
    return name


def _refuse_local_places(job: Job, own: str, profile: Profile) -> None:
    """Places that the run writes to must outlive its pods, and those that it begins from be there."""
    fork = job.checkpoint.fork
    if fork and not (fork[0].startswith("s3://") or _on_volume(fork[0], profile)):
        raise fork_refused(fork[0], own)
    cache = job.data.cache
    outlives = cache is None or cache.startswith("s3://") or _on_volume(cache, profile)
    if not outlives:
        raise JobError(
            f"data.cache {cache} is a folder of this machine.",
            "Leave it out (the cache then lies beside the runs), or give an s3:// prefix.",
        )
    if job.log.mlflow and ("://" not in job.log.mlflow or job.log.mlflow.startswith("file:")):
        raise JobError(
            f"log.mlflow {job.log.mlflow} is a folder of the pod, which is lost with it.",
            "Give the URI of a tracking server.",
        )


def _on_volume(path: str, profile: Profile) -> bool:
    """Whether a path lies on the volume that the pods have as storage."""
    inside = path.startswith(f"{profile.storage.rstrip('/')}/") and ".." not in path.split("/")
    return profile.storage_claim is not None and inside


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
