"""The API of the admin page: statistics, people and their links, pause, export. For the role "admin" only."""

from dataclasses import replace

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..store import Annotator, Store
from ..tasks import json_line
from .gate import Gate
from .security import MAX_ID_DIGITS, read_fields


def admin_routes() -> list[Route]:
    """The routes below /api/admin."""
    return [
        Route("/api/admin/statistics", get_statistics),
        Route("/api/admin/annotators", get_annotators, methods=["GET"]),
        Route("/api/admin/annotators", post_annotator, methods=["POST"]),
        Route("/api/admin/annotators/{id}/active", post_active, methods=["POST"]),
        Route("/api/admin/annotators/{id}/link", post_link, methods=["POST"]),
        Route("/api/admin/pause", post_pause, methods=["POST"]),
        Route("/api/admin/export/comparisons.jsonl", export_comparisons),
        Route("/api/admin/export/demonstrations.jsonl", export_demonstrations),
        Route("/api/admin/export/counts", get_export_counts),
    ]


async def _answer(request: Request, work) -> Response:
    gate: Gate = request.app.state.gate
    return await gate.answer(request, gate.session_of(request), work, role="admin")


async def _answer_post(request: Request, fields: dict, work) -> Response:
    """As `_answer`, for a POST. `work` gets the admin and the fields of the body."""
    gate: Gate = request.app.state.gate
    session = gate.session_of(request)
    gate.check_post(request, session)
    body = await read_fields(request, fields)
    return await gate.answer(request, session, lambda admin: work(admin, body), role="admin")


async def get_statistics(request: Request) -> Response:
    """Counts, agreement, speed and outliers, and what the person who runs the server should see."""
    gate: Gate = request.app.state.gate

    def work(admin: Annotator) -> dict:
        from ..statistics import statistics

        notices = getattr(request.app.state, "notices", None)
        found = dict(statistics(gate.store))
        found["notices"] = [] if notices is None else list(notices())
        found["paused"] = gate.store.settings().paused
        return found

    return await _answer(request, work)


async def get_annotators(request: Request) -> Response:
    """Everybody in the store."""
    gate: Gate = request.app.state.gate

    def work(admin: Annotator) -> dict:
        people = []
        for annotator in gate.store.annotators():
            people.append(
                {
                    "id": annotator.id,
                    "name": annotator.name,
                    "role": annotator.role,
                    "active": annotator.active,
                    "judged": annotator.judged,
                    "skipped": annotator.skipped,
                }
            )
        return {"annotators": people}

    return await _answer(request, work)


async def post_annotator(request: Request) -> Response:
    """Adds a person who judges. Only a command on the server's machine can add another admin."""
    gate: Gate = request.app.state.gate

    def work(admin: Annotator, body: dict) -> dict:
        token = gate.store.add_annotator(body["name"])
        return {"name": body["name"], "link": gate.link(request, token)}

    return await _answer_post(request, {"name": str}, work)


async def post_active(request: Request) -> Response:
    """Ends or restores the access of a person."""
    gate: Gate = request.app.state.gate

    def work(admin: Annotator, body: dict) -> dict:
        annotator = _person(request)
        if annotator.id == admin.id and not body["active"]:
            raise HTTPException(400, "You cannot end your own access: ask another admin.")
        gate.store.set_active(annotator.name, body["active"])
        return {"name": annotator.name, "active": body["active"]}

    return await _answer_post(request, {"active": bool}, work)


async def post_link(request: Request) -> Response:
    """Makes a new link for a person. The old one and the sessions that it opened end."""
    gate: Gate = request.app.state.gate

    def work(admin: Annotator, body: dict) -> dict:
        annotator = _person(request)
        token = gate.store.new_token(annotator.name)
        return {"name": annotator.name, "link": gate.link(request, token)}

    return await _answer_post(request, {}, work)


def _person(request: Request) -> Annotator:
    """The person whose id is in the path. Called in a thread."""
    text = request.path_params["id"]
    annotator = None
    if text.isascii() and text.isdecimal() and len(text) <= MAX_ID_DIGITS:
        annotator = request.app.state.gate.store.annotator(int(text))
    if annotator is None:
        raise HTTPException(404, "There is no such person.")
    return annotator


async def post_pause(request: Request) -> Response:
    """Stops or restarts giving out tasks."""
    gate: Gate = request.app.state.gate

    def work(admin: Annotator, body: dict) -> dict:
        gate.store.save_settings(replace(gate.store.settings(), paused=body["paused"]))
        return {"paused": body["paused"]}

    return await _answer_post(request, {"paused": bool}, work)


# Exports import `datasets`, which takes a second. They do so inside of the work, where nobody waits for it.


async def export_comparisons(request: Request) -> Response:
    """All comparisons as a file, one JSON object a line."""

    def rows_of(store: Store) -> list[dict]:
        from ..export import comparisons

        rows, _ = comparisons(store)
        return rows

    return await _export(request, "comparisons.jsonl", rows_of)


async def export_demonstrations(request: Request) -> Response:
    """All edited and rated answers as a file, one JSON object a line."""

    def rows_of(store: Store) -> list[dict]:
        from ..export import demonstrations

        return demonstrations(store)

    return await _export(request, "demonstrations.jsonl", rows_of)


async def _export(request: Request, name: str, rows_of) -> Response:
    gate: Gate = request.app.state.gate

    def work(admin: Annotator) -> bytes:
        lines = [json_line(row) for row in rows_of(gate.store)]
        return "".join(lines).encode("utf-8", "replace")

    content = await gate.run(request, gate.session_of(request), work, role="admin")
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(content, media_type="application/x-ndjson", headers=headers)


async def get_export_counts(request: Request) -> Response:
    """How many rows the two files would have now, and how many tasks are left out of the comparisons, and why."""
    gate: Gate = request.app.state.gate

    def work(admin: Annotator) -> dict:
        from ..export import comparisons, demonstrations

        _, report = comparisons(gate.store)
        return {
            "tasks": report.rows_in,
            "comparisons": report.kept,
            "left_out": {reason: len(tasks) for reason, tasks in report.dropped.items()},
            "notes": {note: len(tasks) for note, tasks in report.flagged.items()},
            "demonstrations": len(demonstrations(gate.store)),
        }

    return await _answer(request, work)
