"""The job API of one Ray cluster; whatever goes wrong there is one sentence with an exit code."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rayft.errors import JobError, RayftError, ResourceError

#: Seconds to connect, and to wait for the next bytes of an answer.
TIMEOUT_S = (10.0, 120.0)
#: These would otherwise count more than an address that was typed.
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


class NoAnswer(ResourceError):
    """Nobody answers at the address, now."""


class UnknownSubmission(JobError):
    """The cluster has no submission of that name."""


class TakenSubmission(ResourceError):
    """The cluster has a submission of that name already."""


class Client:
    """Submissions of one cluster. Every method raises RayftError: NoAnswer, JobError for a wrong address or token."""

    def __init__(self, address: str | None = None) -> None:
        """address: http(s)://HOST:PORT of the cluster's dashboard; None: RAY_API_SERVER_ADDRESS."""
        self.address = checked_address(address or os.environ.get(ADDRESS_VARIABLES[0], ""))
        self._token = find_token()
        with self._explained(), _typed_address_counts():
            self._jobs = _sdk()(self.address, headers=self._headers())

    def refuse_other_ray(self) -> None:
        """Raise JobError where the cluster runs another Ray than this machine: a job is packed and run by both."""
        import ray

        theirs = str(self._jobs._server_ray_version)
        if theirs.split(".")[:2] != ray.__version__.split(".")[:2]:
            raise JobError(
                f"The cluster at {self.address} runs Ray {theirs}, and here is Ray {ray.__version__}.",
                f"Submit from an environment with Ray {theirs}, or to a cluster with {ray.__version__}.",
            )

    def submit(
        self, submission: str, entrypoint: str, runtime_env: dict[str, Any], metadata: dict[str, str]
    ) -> None:
        """Upload the working directory where the cluster does not have it, and start the job.

        Raises TakenSubmission where the cluster has had one of that name.
        """
        with self._explained(submission):
            self._jobs.submit_job(
                entrypoint=entrypoint,
                submission_id=submission,
                runtime_env=runtime_env,
                metadata=dict(metadata),
            )

    def info(self, submission: str) -> Any:
        """Ray's JobDetails. Raises UnknownSubmission."""
        with self._explained(submission):
            return self._jobs.get_job_info(submission)

    def all(self) -> list[Any]:
        """JobDetails of every submission."""
        with self._explained():
            return [job for job in self._jobs.list_jobs() if job.submission_id]

    def logs(self, submission: str) -> str:
        """What the driver has printed."""
        with self._explained(submission):
            return str(self._jobs.get_job_logs(submission))

    def tail(self, submission: str) -> AsyncIterator[str]:
        """What the driver prints, as it comes; raises whatever breaks the stream."""
        return self._jobs.tail_job_logs(submission)  # type: ignore[no-any-return]

    def stop(self, submission: str) -> None:
        """SIGTERM to the driver, and SIGKILL after RAY_JOB_STOP_WAIT_TIME_S."""
        with self._explained(submission):
            self._jobs.stop_job(submission)

    def has_package(self, uri: str) -> bool:
        """Whether an uploaded working directory is still there."""
        with self._explained():
            return bool(self._jobs._package_exists(uri))

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._token[0]}"} if self._token else {}

    @contextlib.contextmanager
    def _explained(self, submission: str = "") -> Iterator[None]:
        """Errors of Ray and of HTTP as ours. Their texts may quote what was sent, so none of them is passed on whole."""
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except RayftError:
            raise
        except AuthenticationError:
            raise self._refused() from None
        except (requests.exceptions.JSONDecodeError, KeyError, requests.exceptions.InvalidURL):
            raise self._no_job_server() from None
        except requests.exceptions.HTTPError as error:
            if error.response is not None and error.response.status_code < 500:
                raise self._no_job_server() from None
            raise self._no_answer(f"its server answered {error}") from None
        except (requests.exceptions.RequestException, ConnectionError) as error:
            raise self._no_answer(type(error).__name__) from None
        except RuntimeError as error:
            text = str(error)
            if "returned 404" in text:
                raise self._no_job_server() from None
            if "does not exist" in text or "status code 404" in text:
                raise UnknownSubmission(
                    f"The cluster at {self.address} has no submission {submission}.",
                    "`rayft list` shows what it has.",
                ) from None
            if "already exists" in text:
                raise TakenSubmission(
                    f"The cluster at {self.address} has had a submission {submission} already.",
                    "Submit again: somebody else has just submitted this run.",
                ) from None
            raise self._no_answer(f"the request failed: {self._without_token(text)[:300]}") from None

    def _refused(self) -> JobError:
        if self._token is None:
            return JobError(
                f"The cluster at {self.address} asks for a token, and there is none here.",
                "Set RAY_AUTH_TOKEN_PATH to a file with the cluster's token (or RAY_AUTH_TOKEN, or write it to "
                "~/.ray/auth_token), with RAY_AUTH_MODE unset or token.",
            )
        return JobError(
            f"The cluster at {self.address} refuses the token from {self._token[1]}.",
            "Ask whoever runs the cluster for its token.",
        )

    def _no_job_server(self) -> JobError:
        return JobError(
            f"What answers at {self.address} is no Ray job server.",
            "Give the address of the dashboard of the cluster's head, such as http://HOST:8265.",
        )

    def _no_answer(self, why: str) -> NoAnswer:
        return NoAnswer(
            f"No Ray cluster answers at {self.address} ({why}).",
            "Start it or correct --address; in Kubernetes forward its port: kubectl port-forward svc/NAME-head-svc 8265.",
        )

    def _without_token(self, text: str) -> str:
        return text.replace(self._token[0], "***") if self._token else text


def checked_address(address: str) -> str:
    """The address with a scheme and nothing else. Raises JobError."""
    remedy = "Give --address http://HOST:8265 (or set RAY_API_SERVER_ADDRESS): the dashboard of the cluster's head."
    if not address:
        raise JobError("No cluster is named.", remedy)
    address = address if "://" in address else f"http://{address}"
    try:
        parts = urlsplit(address)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        raise JobError(f"The address {address!r} is no URL.", remedy) from None
    if "@" in parts.netloc:
        raise JobError("The address carries a user or password.", "Give the token by RAY_AUTH_TOKEN_PATH.")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise JobError(f"The address {address!r} is not http:// or https:// with a host.", remedy)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}"


def find_token() -> tuple[str, str] | None:
    """The token and where it comes from, looked for where Ray does; None: none there, or switched off.

    Raises JobError for a RAY_AUTH_TOKEN_PATH that cannot be read.
    """
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token, "RAY_AUTH_TOKEN"
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(given or "~/.ray/auth_token").expanduser()
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        token = ""
    if token:
        return token, str(path)
    if given:
        raise JobError(f"RAY_AUTH_TOKEN_PATH names {path}, and there is no token to read.", "Correct it.")
    return None


def _sdk() -> Any:
    """Ray's client, with an end to its waiting."""
    from ray.job_submission import JobSubmissionClient

    class Patient(JobSubmissionClient):  # type: ignore[misc]
        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, **{"timeout": TIMEOUT_S, **options})

    return Patient


@contextlib.contextmanager
def _typed_address_counts() -> Iterator[None]:
    saved = {name: os.environ.pop(name) for name in ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)
