"""What `kunserve up` says when the first request can be sent."""

from __future__ import annotations

import json
from typing import Any


def greeting(base_url: str, models: Any, workers: int) -> str:
    """The ready line and an example; `models` is the answer of `GET /v1/models`."""
    model = served_model(models)
    request = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "stream": True,
    }
    of_workers = "1 worker" if workers == 1 else f"{workers} workers"
    return (
        f"\nKunServe serves {model} with {of_workers} at {base_url}/v1\n\n"
        f"  curl -N {base_url}/v1/chat/completions \\\n"
        "    -H 'Content-Type: application/json' \\\n"
        f"    -d '{json.dumps(request)}'\n\n"
        "Ctrl-C stops it.\n\n"
    )


def served_model(models: Any) -> str:
    """The first model of a `GET /v1/models` answer, or what the API takes for any."""
    match models:
        case {"data": [{"id": str(model)}, *_]}:
            return model
    return "default"
