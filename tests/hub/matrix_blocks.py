"""Runs the code blocks of model cards in a new process, each in a namespace of its own, and records what they computed.

`python matrix_blocks.py CARDS.json RESULTS.pt`: a card is a dict with `blocks` (list of code) and `probes` (lists of
token ids). Blocks without this library run first, and this library must not be loaded until then: none needs what
another one imports.
"""

import contextlib
import io
import json
import sys
import traceback
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel

LIBRARY = "hf_rlhf_ext"


class Recorder:
    """What the block that runs now generated and scored, in tokens and numbers."""

    def __init__(self):
        self.start()
        generate = GenerationMixin.generate

        def recorded(model, inputs=None, *args, **kwargs):
            output = generate(model, inputs, *args, **kwargs)
            prompt = inputs if inputs is not None else kwargs["input_ids"]
            self._remember(model)
            self.generated.append((prompt[0].tolist(), getattr(output, "sequences", output)[0].tolist()))
            return output

        GenerationMixin.generate = recorded
        torch.nn.modules.module.register_module_forward_hook(self._scored, with_kwargs=True)

    def start(self) -> None:
        self.generated: list[tuple[list[int], list[int]]] = []
        self.scored: list[tuple[list[int], list[float]]] = []
        self.model: PreTrainedModel | None = None
        self.is_probing = False

    def _remember(self, model: PreTrainedModel) -> None:
        self.model = model
        self.autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None

    def _scored(self, module, args, kwargs, output) -> None:
        if self.is_probing or not type(module).__name__.endswith("ForSequenceClassification"):
            return
        ids = args[0] if args else kwargs["input_ids"]
        self._remember(module)
        for row, score in zip(ids.tolist(), output.logits.float().tolist(), strict=True):
            self.scored.append((row, score))

    @torch.no_grad()
    def probe(self, probes: list[list[int]]) -> list[torch.Tensor]:
        """Logits of the block's model for these tokens, in the precision of the block."""
        self.is_probing = True
        self.model.eval()
        with torch.autocast("cpu", self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            return [self.model(input_ids=torch.tensor([ids])).logits[0].float() for ids in probes]


def run_block(code: str, probes: list[list[int]], recorder: Recorder) -> dict[str, Any]:
    recorder.start()
    names: dict[str, Any] = {"__name__": "__main__"}
    result: dict[str, Any] = {"code": code, "error": None, "logits": []}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            exec(compile(code, "block", "exec"), names)
        except Exception:
            result["error"] = traceback.format_exc()
    result |= {"printed": out.getvalue(), "generated": recorder.generated, "scored": recorder.scored}
    result["example"] = [names.get(name) for name in ("prompt", "completion")]
    if recorder.model is not None:
        result["is_quantized"] = bool(getattr(recorder.model, "is_quantized", False))
        result["logits"] = recorder.probe(probes)
    if LIBRARY not in code and LIBRARY in sys.modules:
        result["error"] = f"{LIBRARY} was loaded, but the block does not name it"
    return result


def main() -> None:
    cards_path, results_path = sys.argv[1:]
    with open(cards_path, encoding="utf-8") as file:
        cards = json.load(file)
    recorder = Recorder()
    blocks = [(name, index, code) for name, card in cards.items() for index, code in enumerate(card["blocks"])]
    blocks.sort(key=lambda block: LIBRARY in block[2])  # stable
    results = {(name, index): run_block(code, cards[name]["probes"], recorder) for name, index, code in blocks}
    torch.save(results, results_path)


if __name__ == "__main__":
    main()
