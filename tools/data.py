"""What a compilation calibrates on and is judged on: text in tokens, what the model writes itself, or arrays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ir.errors import NomulError, UnsupportedError, UsageError
from tools.console import note

if TYPE_CHECKING:
    from torch import Tensor

    from frontend.open import Model
    from ir.execute import Batch
    from passes.pipeline import Pipeline
    from tools.arrays import ArrayData
    from tools.calibration import TokenData, Windows
    from tools.options import BuildOptions

    Data = TokenData | ArrayData


def readable_data(spec: str) -> dict[str, Tensor] | None:
    """Return the arrays that `--calib` names, None for text, which is only looked at.

    Raises UsageError for what cannot be read, which is found out before a model is traced.
    """
    from tools.arrays import is_array_file, load_arrays
    from tools.self_text import SELF
    from tools.text import load_text

    if is_array_file(spec):
        return load_arrays(spec)
    if spec != SELF:
        load_text(spec)
    return None


def calibration_data(
    model: Model, pipeline: Pipeline, options: BuildOptions, arrays: Mapping[str, Tensor] | None
) -> Data | None:
    """Return calibration and held-out batches; None when no pass needs data and text cannot be given to the model.

    arrays: those of the file named, None for text. Raises UsageError and UnsupportedError for data that do not fit.
    """
    from ir.analysis import predicts_tokens
    from tools.arrays import array_data

    needed = any(pass_.needs() is not None for pass_ in pipeline.passes())
    samples = options.samples if needed else 1
    if arrays is not None:
        data: Data | None = array_data(model.program, options.calib, arrays, samples, options.seed)
    else:
        data = _text_data(model, options, samples, needed)
    if data is not None and (arrays is not None or not predicts_tokens(model.program)):
        _check_runs(model, data.calibration[0])
    return data


def _text_data(model: Model, options: BuildOptions, samples: int, needed: bool) -> TokenData | None:
    from frontend.tokenizer import load_tokenizer
    from ir.execute import check_takes_text
    from tools.calibration import token_data
    from tools.self_text import SELF, self_data

    if options.calib == SELF:
        _check_context(model, options.seqlen)
        return self_data(model.program, samples, options.seqlen, options.seed)
    try:
        check_takes_text(model.program)
        tokenizer = load_tokenizer(model.path)
    except UnsupportedError as error:
        if needed:
            raise
        note(f"{error.what} ({error.why}): the quality of the result is not judged")
        return None
    _check_context(model, options.seqlen)
    data = token_data(tokenizer, options.calib, samples, _windows(model, tokenizer, options.seqlen), options.seed)
    _check_vocabulary(model, data)
    return data


def _windows(model: Model, tokenizer: object, seqlen: int) -> Windows:
    """Return how windows of text look to a model: one that predicts no tokens has seen special ones around them."""
    from ir.analysis import IDS, predicts_tokens
    from ir.program import tensor_type_of
    from tools.calibration import HELD_OUT_LENGTH, Windows, special_tokens

    short = min(HELD_OUT_LENGTH, seqlen)
    if predicts_tokens(model.program):
        return Windows(seqlen, short)
    rows, length = tensor_type_of(model.program.node(IDS)).dims
    if isinstance(rows, int) and rows > 1:
        raise UnsupportedError(
            f"the model takes text in batches of {rows} only",
            where=str(model.path),
            fix="give arrays: --calib FILE.npz, or export the model with an open batch",
        )
    before, after = special_tokens(tokenizer)
    return Windows(seqlen, seqlen if isinstance(length, int) else short, before, after, 1 if rows == 1 else None)


def _check_vocabulary(model: Model, data: TokenData) -> None:
    """Raise UnsupportedError for token ids that the model's table of embeddings does not have."""
    from ir.analysis import stream_input
    from ir.lookups import looked_up

    known, largest = looked_up(model.program), max(int(batch.max()) for batch in data.calibration)
    rows = known.get(stream_input(model.program).name)
    if rows is not None and largest >= rows:
        raise UnsupportedError(
            "the tokenizer does not belong to the model",
            where=str(model.path),
            why=f"it gives token {largest}, and the model knows {rows} tokens",
            fix="put the tokenizer files of the original model beside its weights",
        )


def _check_context(model: Model, seqlen: int) -> None:
    context = getattr(model.config, "max_position_embeddings", None) if model.config is not None else _beside(model)
    if isinstance(context, int) and seqlen > context:
        raise UsageError(
            f"--seqlen {seqlen} is longer than the model's context",
            where=str(model.path),
            why=f"its configuration allows {context} positions",
            fix=f"give --seqlen {context} or less",
        )


def _beside(model: Model) -> object:
    """Return the context that the config.json in a model's folder tells, None where there is none to be read."""
    folder = model.path if model.path.is_dir() else model.path.parent
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):
        return None


def _check_runs(model: Model, batch: Batch) -> None:
    """Raise UnsupportedError where a model fails on calibration: what its tables and shapes allow is not declared."""
    from ir.execute import batch_inputs, batch_rows, run_in_parts, split_batch
    from ir.program import tensor_type_of

    fixed = isinstance(tensor_type_of(model.program.inputs[0]).dims[0], int)
    few = split_batch(batch, batch_rows(batch) if fixed else 1)[0]
    try:
        run_in_parts(model.program, batch_inputs(model.program, few))
    except NomulError:
        raise
    # Operators raise whatever their checks do: IndexError, RuntimeError, ValueError and more.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UnsupportedError(
            "the model cannot run on the calibration data",
            where=str(model.path),
            why=f"{type(error).__name__}: {(lines or ['no message'])[0][:300]}",
            fix="give a smaller --seqlen for text, or arrays of the sizes that the model was made for",
        ) from error
