"""The end of a search, or a look at one: everything it answers, made from its folder, without Ray and at any time."""

from __future__ import annotations

from rich.console import Console
from rich.syntax import Syntax

from rayft.errors import RayftError
from rayft.report.log import read_all
from rayft.report.trials import trials_of
from rayft.spec import Job
from rayft.storage import Store
from rayft.tune.best import BEST, export_best, write_best
from rayft.tune.choose import Choice, choose
from rayft.tune.page import PAGE, write_page
from rayft.tune.table import trials_table

#: Columns of a table that no terminal folds.
WIDE = 160


def answer(store: Store, search: Job, console: Console, *, export: bool = True) -> Choice:
    """Write best.yaml, model/ and report.html of the search folder `store`, and show them. search: its job.

    Raises what `choose` raises where there is no best trial. The page is written then too, and says so. A model that cannot be
    exported is told, and does not take the other answers away.
    """
    assert search.tune is not None, "a search has a group `tune`"
    if not console.is_terminal:
        console.width = max(console.width, WIDE)
    trials = trials_of(read_all(store))
    console.print(trials_table(trials, search.tune.aims))
    try:
        choice = choose(trials, search.tune.aims, search.tune.constraints)
    except RayftError:
        write_page(store, search)
        console.print(f"Report: {store.where(PAGE)}", soft_wrap=True, highlight=False)
        raise
    text = write_best(store, search, choice, trials)
    write_page(store, search)
    found = ", ".join(f"{metric} {number:.4g}" for metric, number in choice.values.items())
    console.print(f"Best: {choice.trial.trial}, {found}, {choice.how}.", soft_wrap=True, highlight=False)
    console.print(Syntax(text, "yaml", background_color="default", word_wrap=True))
    if export:
        try:
            console.print(export_best(store, choice), soft_wrap=True, highlight=False)
        except RayftError as error:
            console.print(f"No model was exported: {error}", style="yellow", soft_wrap=True, highlight=False)
    local = store.local_path(BEST)
    how = (
        f"Run it: rayft run {local}"
        if local
        else f"Save {store.where(BEST)} as a file and run it: rayft run {BEST}"
    )
    console.print(how, soft_wrap=True, highlight=False)
    console.print(f"Report: {store.where(PAGE)}", soft_wrap=True, highlight=False)
    return choice
