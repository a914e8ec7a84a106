"""A ring's status and samples as text and tables for a terminal; nothing is printed here."""

import json
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from synthbroker import schema
from synthbroker.audit import Audit
from synthbroker.batch import Batch
from synthbroker.fitting import Fitted
from synthbroker.generate import Outcome
from synthbroker.ledger import Equation, Ledger
from synthbroker.quarantine import BadSample
from synthbroker.schema import Array
from synthbroker.slurm import Run, RunStatus
from synthbroker.states import ConsumerStatus, GroupStatus, ProducerStatus, RingStatus, Twins
from synthbroker.units import format_duration, format_size, plural

MOST_ROWS = 40
_MOST_RECIPE = 200
_STATES = {"alive": "green", "silent": "red", "left": "yellow", "closed": "dim"}


def of_status(status: RingStatus) -> RenderableType:
    """Show a ring, its groups with their members, its producers and its ledger."""
    parts: list[RenderableType] = [_head(status)]
    if status.groups:
        parts += ["", _groups(status.groups)]
        members = [(name, *member) for name, group in status.groups.items() for member in group.consumers.items()]
        if members:
            parts += ["", _consumers(members)]
    else:
        parts += ["", Text("no group reads this ring yet", "yellow")]
    if status.producers:
        parts += ["", _producers(status.producers)]
    return Group(*parts, "", _ledger(status.ledger))


def _head(status: RingStatus) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for name, value in _head_lines(status):
        table.add_row(Text(name, "dim"), value if isinstance(value, Text) else Text(value))
    return Group(Text.assemble((f"ring {status.ring}", "bold"), f" on {status.where}"), table)


def _head_lines(status: RingStatus) -> Iterator[tuple[str, str | Text]]:
    yield "state", Text("ended", "yellow") if status.ended else Text("open", "green")
    limit = f", at most {_samples(status.max_samples)}" if status.max_samples else ""
    yield "policy", f"{status.when_full}, capacity {format_size(status.capacity_bytes)}{limit}"
    yield "holds", f"{_samples(status.live)}, {format_size(status.bytes)}, {status.fill:.1%} full{_ages(status)}"
    yield "flow", f"{status.samples_per_s:.3g} samples/s, {format_size(round(status.bytes_per_s))}/s"
    yield "so far", f"{status.committed} committed, {status.evicted} evicted, {status.duplicates} sent twice"
    bad = Text(f"{status.quarantined} quarantined, {status.foreign} foreign")
    bad.stylize("red" if status.quarantined or status.foreign else "")
    yield "bad", bad
    yield "schema", status.schema or "none yet"
    if status.info:
        yield "info", json.dumps(status.info)
    if status.expected_producers:
        wanted = f"{status.expected_producers} producers are" if status.expected_producers > 1 else "one producer is"
        yield "ends", f"when {wanted} done, {status.closed_producers} so far"
    if status.wasted_s:
        yield "wasted", Text(f"{format_duration(status.wasted_s)} of generating: no group has seen what left", "yellow")
    if status.twins:
        yield "twins", Text(_twins(status.twins), "red")
    if status.waiting:
        yield "waiting", Text("producers wait for room", "yellow")
    yield "idle", _idle(status)
    yield "advice", status.advice


def _idle(status: RingStatus) -> str:
    """Say who waits for whom, lately and ever."""
    starved = [
        f"training of group {name} starved {group.starved_share:.0%} (ever {group.starved_ever_share:.0%})"
        for name, group in status.groups.items()
        if group.starved_share is not None
    ]
    ever = f"{status.blocked_ever_share:.0%}"
    if any(one.heard for one in status.producers.values()):
        blocked = f"generators blocked {status.blocked_share:.0%} of their time (ever {ever})"
    else:
        blocked = f"generators were blocked {ever} of their time"
    return "; ".join([blocked, *starved])


def _twins(twins: Sequence[Twins]) -> str:
    lines = [
        f"{one.second} sends what it sent in a former life (same seed?)"
        if one.first == one.second
        else f"{one.second} sends what {one.first} sends (same seed?): {_samples(one.samples)} alike"
        for one in twins[:MOST_ROWS]
    ]
    return "\n".join([*lines, *([f"and {len(twins) - MOST_ROWS} more"] if len(twins) > MOST_ROWS else [])])


def _samples(count: int) -> str:
    return f"{count} {plural('sample', count)}"


def _ages(status: RingStatus) -> str:
    if status.oldest_age_s is None or status.newest_age_s is None:
        return ""
    return f", {format_duration(status.newest_age_s)} to {format_duration(status.oldest_age_s)} old"


def _groups(groups: dict[str, GroupStatus]) -> RenderableType:
    names = ("delivered", "acknowledged", "pending", "unread", "lost", "evicted_pending", "reused", "redelivered",
             "doubled", "skipped")  # fmt: skip
    table = _table("group", "reuse", *names, "wasted")
    for name, group in groups.items():
        numbers = [Text(str(getattr(group, field)), _alarm(field, getattr(group, field))) for field in names]
        wasted = Text(format_duration(group.wasted_s), "red") if group.wasted_s else "-"
        table.add_row(Text(name, "bold"), group.reuse or "-", *numbers, wasted)
    return Group(
        Fitted(table), *[Text(f"{name}: {_uses(group)}", "dim") for name, group in groups.items() if group.uses]
    )


def _uses(group: GroupStatus) -> str:
    """Say how often the samples in the ring were used."""
    return "of those in the ring " + ", ".join(
        f"{count} used {'up to ' if int(times) > 8 else ''}{times}x" for times, count in group.uses.items()
    )


def _alarm(name: str, value: int) -> str:
    return "red" if value and name in ("lost", "evicted_pending", "doubled") else ""


def _consumers(members: Sequence[tuple[str, str, ConsumerStatus]]) -> RenderableType:
    table = _table("group", "reader", "state", "seen", "pending", "starved", "ever", "host", "pid", "job")
    for group, name, member in members[:MOST_ROWS]:
        says = member.starved_share is not None
        shares = (f"{member.starved_share:.0%}", f"{member.starved_ever_share:.0%}") if says else ("-", "-")
        seen = _seen(member.seen_s)
        table.add_row(group, name, _state(member.state), seen, str(member.pending), *shares, *_where(member))
    return _with_rest(table, len(members), "reader")


def _producers(producers: dict[str, ProducerStatus]) -> RenderableType:
    columns = ["producer", "state", "seen", "committed", "samples/s", "per s", "blocked", "ever", "host", "pid", "job"]
    codecs = any(one.codec for one in producers.values())  # where "auto" chose any
    table = _table(*columns, *(["codec"] if codecs else []))
    ordered = sorted(producers.items(), key=lambda item: (list(_STATES).index(item[1].state), item[0]))
    for name, one in ordered[:MOST_ROWS]:
        shares = (f"{one.blocked_share:.0%}", f"{one.blocked_ever_share:.0%}")
        rates = (f"{one.samples_per_s:.3g}", format_size(round(one.bytes_per_s)), *shares)
        chosen = [", ".join(f"{field} {codec}" for field, codec in one.codec.items())] if codecs else []
        table.add_row(name, _state(one.state), _seen(one.seen_s), str(one.committed), *rates, *_where(one), *chosen)
    return _with_rest(table, len(producers), "producer")


def _with_rest(table: Table, count: int, what: str) -> RenderableType:
    if count <= MOST_ROWS:
        return Fitted(table)
    rest = f"and {count - MOST_ROWS} more {plural(what, count - MOST_ROWS)}: --json has them all"
    return Group(Fitted(table), Text(rest, "dim"))


def _ledger(ledger: Ledger) -> RenderableType:
    if ledger.balanced:
        return Text(f"ledger: balanced, all {len(ledger.equations)} equations hold", "green")
    wrong = [equation for equation in ledger.equations if equation.difference]
    lines = [f"  {one.law}: {one.left} = {one.right} is off by {one.difference}" for one in wrong]
    return Text("\n".join(["ledger: does not add up", *lines]), "red")


def of_ring(status: RingStatus) -> str:
    """Show a ring in a line."""
    flow = "ended" if status.ended else f"{status.samples_per_s:.3g} samples/s"
    return f"ring {status.ring}: {_samples(status.live)}, {status.fill:.1%} full, {flow}"


def of_audit(audit: Audit) -> RenderableType:
    """Show every law with its figures, what stands beside them, and each difference by name."""
    table = _table("law", "figures", "difference")
    for one in audit.equations:
        sums = " + ".join(f"{term:,}" for term in one.terms)
        off = Text(f"{one.difference:+,}", "red") if one.difference else Text("-", "dim")
        table.add_row(one.law, f"{one.left:,} = {sums}" if not one.difference else f"{one.left:,} ≠ {sums}", off)
    apart = [_apart(name, counts) for name, counts in audit.apart.items()]
    parts: list[RenderableType] = [
        Text.assemble((f"ring {audit.ring}", "bold"), f" on {audit.where}, epoch {audit.epoch}"),
        Text(
            f"{_counted('sample', audit.live)}, {format_size(audit.bytes)}, {_counted('part', audit.parts)}"
            f"{_meanwhile(audit)}"
        ),
        "",
        table,
        "",
        *[Text(line) for line in apart],
        Text(
            f"under way: room for {_counted('sample', audit.leased_samples)}, {format_size(audit.leased_bytes)}; "
            f"leases past their end: {audit.expired_leases}; entries in the stream that are not ours: {audit.foreign}"
        ),
    ]
    return Group(*parts, "", _verdict(audit.equations, audit.details))


def of_quarantine(samples: Sequence[BadSample]) -> RenderableType:
    """List bad samples, the oldest first."""
    table = _table("noted", "sample", "producer", "reason", "recipe")
    for one in samples:
        noted = datetime.fromtimestamp(one.noted_s, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        recipe = json.dumps(one.recipe)
        short = recipe if len(recipe) <= _MOST_RECIPE else f"{recipe[:_MOST_RECIPE]}…"
        table.add_row(noted, one.number or "-", one.producer or "-", one.reason, short)
    return table


def _apart(group: str, counts: dict[str, int]) -> str:
    return f"{group}, counted apart: " + ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _counted(noun: str, count: int) -> str:
    return f"{count:,} {plural(noun, count)}"


def _meanwhile(audit: Audit) -> str:
    return f"; {_counted('sample', audit.moved)} came or left while parts were looked at" if audit.moved else ""


def _verdict(equations: Sequence[Equation], details: Sequence[str]) -> Text:
    wrong = [one for one in equations if one.difference]
    if not wrong:
        return Text(f"balanced: all {len(equations)} laws hold", "green")
    lines = [f"  {one.law}: off by {one.difference:+,}" for one in wrong] + [f"  {detail}" for detail in details]
    return Text("\n".join(["does not balance", *lines]), "red")


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    words = (
        "group",
        "reader",
        "producer",
        "state",
        "host",
        "job",
        "codec",
        "law",
        "figures",
        "noted",
        "reason",
        "recipe",
        "role",
        "node",
        "why",
    )
    for column in columns:
        table.add_column(column.replace("_", " "), justify="left" if column in words else "right", overflow="fold")
    return table


def _state(state: str) -> Text:
    return Text(state, _STATES.get(state, ""))


def _seen(seen_s: float | None) -> str:
    return "-" if seen_s is None else f"{format_duration(seen_s)} ago"


def _where(who: ProducerStatus | ConsumerStatus) -> Iterable[str]:
    return (who.host or "-", str(who.pid or "-"), who.job_id or "-")


def of_sample(sample: Batch) -> str:
    """Describe one peeked sample in a few lines: where it is from, its fields with their ranges, its recipe."""
    info = sample.info
    lines = [f"{info.ids[0]}: {format_duration(info.ages_s[0])} old, from {info.producers[0]}, seq {info.seqs[0]}"]
    specs = {name: str(schema.infer({name: array})) for name, array in sample.items()}
    width = max(len(spec) for spec in specs.values())
    lines += [f"  {specs[name]:<{width}}  {figures(array)}" for name, array in sample.items()]
    for name, value in ("recipe", info.recipes[0]), ("metadata", info.metadata[0]):
        if value:
            lines.append(f"  {name} {json.dumps(value)}")
    return "\n".join(lines)


def figures(array: Array) -> str:
    """Say least, greatest and mean of what is finite, and how much is not."""
    if array.size == 0:
        return "empty"
    values: np.ndarray[Any, Any] = np.abs(array) if array.dtype.kind == "c" else array
    # ml_dtypes and bool know no mean of their own, and float16 overflows.
    numbers = values.astype(np.float64)
    finite = numbers[np.isfinite(numbers)]
    odd = f", {numbers.size - finite.size} not finite" if finite.size < numbers.size else ""
    if finite.size == 0:
        return "nothing finite"
    size = "magnitude " if array.dtype.kind == "c" else ""
    return f"{size}min {finite.min():.4g}, max {finite.max():.4g}, mean {finite.mean():.4g}{odd}"


def of_outcome(ring: str, outcome: Outcome, exit_time: int) -> str:
    """Say in a line what `generate` did."""
    sizes = f"{format_size(outcome.raw_bytes)}, {format_size(outcome.payload_bytes)} sent"
    counts = [f"{_samples(outcome.samples)} in ring {ring} ({sizes})"]
    if outcome.lost:
        counts.append(f"lost {outcome.lost} of them: the server was emptied, or the ring dropped, meanwhile")
    if outcome.quarantined:
        counts.append(f"{outcome.quarantined} failed the checks and went to quarantine")
    if outcome.unsent:
        counts.append(f"{outcome.unsent} {'was' if outcome.unsent == 1 else 'were'} not sent")
    if outcome.blocked_s >= 1:
        counts.append(f"waited {format_duration(outcome.blocked_s)} for room, all workers together")
    if outcome.ended:
        counts.append("the ring has ended" if outcome.samples else "the generator yielded nothing; the ring has ended")
    if outcome.stopped == "time":
        counts.append(f"stopped because the job ends, start it again to go on (exit code {exit_time})")
    if outcome.stopped == "ended":
        counts.append("stopped because the ring was ended meanwhile: nobody wants more (a new run says --reopen)")
    if outcome.idle_for_s is not None:
        counts.append(_left_idle(ring, outcome.idle_for_s))
    return "; ".join(counts)


def _left_idle(ring: str, idle_for_s: float) -> str:
    return (
        f"stopped because ring {ring} had had no room for {format_duration(idle_for_s)} (--idle-s): its readers are "
        f"slower, or away. `synthbroker status {ring}` says whether more generators are needed; submit this job again "
        "then. To stay longer raise --idle-s, to go on generating meanwhile give a new ring more --capacity"
    )


def of_run(run: Run) -> str:
    """Say which jobs were submitted, and how to look at them."""
    width = max(len(role) for role in run.jobs)
    lines = [f"{role:<{width}}  job {number:<8}  {run.logs_of(role)}" for role, number in run.jobs.items()]
    return "\n".join([
        *lines,
        "",
        f"  synthbroker slurm status {run.folder}",
        f"  tail -F {run.folder / 'logs'}/*.out",
        f"  synthbroker slurm down {run.folder}",
    ])  # fmt: skip


def of_run_status(status: RunStatus) -> RenderableType:
    """Show the jobs of a run, its broker, its rings and what went wrong."""
    roles = {number: role for role, number in status.run.jobs.items()}
    table = _table("job", "role", "state", "node", "runs for", "left", "why")
    for job in status.jobs[:MOST_ROWS]:
        why = "" if job.reason == "None" else job.reason
        table.add_row(job.id, roles[job.job], job.state.lower(), job.nodes, job.elapsed, job.left, why)
    known = {job.job for job in status.jobs}
    for number, role in roles.items():
        if number not in known:
            table.add_row(number, role, "ended", "", "", "", "SLURM has forgotten it")
    rings = [
        f"{of_ring(one)}; "
        f"`synthbroker status {one.ring} --url {(status.run.folder / 'broker.json').as_uri()}` says more"
        for one in status.rings
    ]
    jobs = table if roles else "jobs were submitted by hand: `squeue --me` shows them"
    return Group(jobs, "", f"broker {status.broker}", *rings, *(Text(one, "red") for one in status.troubles))
