"""Search, for training jobs: filters over anything that DescribeTrainingJob says, and over tags."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from control_plane import validation
from control_plane.listing import page
from control_plane.operations_tags import shown
from control_plane.operations_training import description
from control_plane.place import Place
from control_plane.refusal import invalid
from control_plane.store import Request

Record = dict[str, Any]
_ORDERS: dict[str, Callable[[Any, Any], bool]] = {
    "GreaterThan": operator.gt,
    "GreaterThanOrEqualTo": operator.ge,
    "LessThan": operator.lt,
    "LessThanOrEqualTo": operator.le,
}


def search(request: Request, place: Place) -> Record:
    """Only `Resource=TrainingJob`; newest change first unless told otherwise."""
    if request["Resource"] != "TrainingJob":
        raise invalid(f"This control plane searches TrainingJob, not {request['Resource']}.")
    if "VisibilityConditions" in request or request.get("CrossAccountFilterOption") == "CrossAccount":
        raise invalid("VisibilityConditions and CrossAccount searches are not emulated by this control plane.")
    with place.store.lock:
        jobs = [(each, dict(each.tags)) for each in place.store.jobs.values()]
    members = validation.service("sagemaker").shape_for("TrainingJob").members
    records = [
        {name: value for name, value in description(job).items() if name in members} | ({"Tags": shown(tags)} if tags else {})
        for job, tags in jobs
    ]
    found = [each for each in records if matches(each, request.get("SearchExpression", {}))]
    by = request.get("SortBy", "LastModifiedTime")
    descending = request.get("SortOrder", "Descending") == "Descending"
    rows, token = page(
        found, request, lambda row: _sortable(next(values(row, by), None)), lambda row: str(row["TrainingJobName"]), descending=descending
    )
    return {
        "Results": [{"TrainingJob": each} for each in rows],
        "NextToken": token,
        "TotalHits": {"Value": len(found), "Relation": "EqualTo"},
    }


def matches(record: Record, expression: Record) -> bool:
    """Whether a record passes a SearchExpression; an empty one passes everything."""
    parts = [holds(record, each) for each in expression.get("Filters", [])]
    parts += [_nested(record, each) for each in expression.get("NestedFilters", [])]
    parts += [matches(record, each) for each in expression.get("SubExpressions", [])]
    if not parts:
        return True
    return any(parts) if expression.get("Operator") == "Or" else all(parts)


def _nested(record: Record, nested: Record) -> bool:
    """All filters hold for one and the same element of a list, such as one channel."""
    name = nested["NestedPropertyName"]
    elements = record.get(name, [])
    return any(all(holds({name: [each]}, one) for one in nested["Filters"]) for each in elements if isinstance(elements, list))


def holds(record: Record, one: Record) -> bool:
    """Whether a record passes one filter."""
    found, test = list(values(record, one["Name"])), one.get("Operator", "Equals")
    if test in ("Exists", "NotExists"):
        if "Value" in one:
            raise invalid(f"Value must not be specified for the operator {test}.")
        return bool(found) is (test == "Exists")
    if "Value" not in one:
        raise invalid(f"Value is required for the operator {test}.")
    value = str(one["Value"])
    if test == "In":
        return any(_text(each) in [part.strip() for part in value.split(",")] for each in found)
    if test == "Contains":
        return any(value in _text(each) for each in found)
    if test in _ORDERS:
        return any(_ordered(_ORDERS[test], each, value) for each in found)
    equal = any(_equal(each, value) for each in found)
    return equal if test == "Equals" else not equal


def values(record: Record, name: str) -> Iterator[Any]:
    """What a property name stands for: `TrainingJobName`, `HyperParameters.epochs`, `Tags.project`, `Metrics.loss`, `Tags.key`."""
    head, _, rest = name.partition(".")
    if head == "Tags" and rest:
        for tag in record.get("Tags", []):
            if tag["Key"] == rest:
                yield tag["Value"]
            if rest.lower() in ("key", "value"):
                yield tag[rest.capitalize()]
        return
    if head == "Metrics":
        yield from (each["Value"] for each in record.get("FinalMetricDataList", []) if each["MetricName"] == rest)
        return
    yield from _walk(record, name)


def _walk(value: Any, name: str) -> Iterator[Any]:
    if isinstance(value, list):
        for each in value:
            yield from _walk(each, name)
        return
    if not name:
        yield value
        return
    if isinstance(value, dict):
        if name in value:  # a hyperparameter's name may have dots
            yield from _walk(value[name], "")
            return
        head, _, rest = name.partition(".")
        if head in value:
            yield from _walk(value[head], rest)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _equal(value: Any, wanted: str) -> bool:
    if isinstance(value, (int, float, datetime)) and not isinstance(value, bool):
        return _ordered(operator.eq, value, wanted)
    return _text(value) == (wanted.lower() if isinstance(value, bool) else wanted)


def _ordered(test: Callable[[Any, Any], bool], value: Any, wanted: str) -> bool:
    """A number or a time compared with a filter's text. Raises Refused for a text that is neither."""
    try:
        if isinstance(value, datetime):
            moment = datetime.fromisoformat(wanted)
            return test(value, moment if moment.tzinfo else moment.replace(tzinfo=UTC))
        return test(float(value), float(wanted))
    except ValueError as exc:
        raise invalid(f"The value {wanted!r} cannot be compared with {_text(value)!r}.") from exc


def _sortable(value: Any) -> Any:
    return "" if value is None else value
