"""Models and arguments that do not fit the kernels: an exception that says what is wrong, never a crash."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from backends.native.layout import Layout, Packed, pack
from backends.native.library import MODES, Library, load
from ir.errors import UnsupportedError, UsageError
from tests.coded_weights import shift_codes
from tests.native_runs import lines_of


def test_a_level_that_the_cpu_lacks_is_told_everywhere() -> None:
    code = """
from tests.test_onnx_kernels import linear_session
told(lambda: load().level)
told(lambda: load().linear(torch.zeros(1, 96), PACKED))
told(lambda: load().linear(torch.zeros(20, 96), PACKED))
told(lambda: load().decode(PACKED))
told(lambda: load().hadamard(torch.zeros(1, 2), torch.ones(2), [torch.ones(2, 2)]))
told(lambda: linear_session(PACKED, None))
load().use("portable")
assert load().linear(torch.zeros(1, 96), PACKED).shape == (1, 40)
"""
    lines = lines_of(code, NOMUL_LEVEL="avx4096")
    assert len(lines) == 6 and "NOMUL_LEVEL" in lines[0] and "portable" in lines[0]
    for line in lines[1:]:
        assert "NOMUL_LEVEL is avx4096, and this CPU runs portable" in line


def test_a_runtime_that_is_too_old_is_told() -> None:
    code = """
from backends.native.build import built_library
register = ctypes.CDLL(str(built_library())).RegisterCustomOps
register.restype, register.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p]
make = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
get = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
@make
def create_status(code, text):
    print(code, text.decode())
    return 77
table = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p).value)
asked = []
@get
def none(version):
    asked.append(version)
    return None
@get
def old(version):
    return ctypes.addressof(table) if version < 17 else None
options = ctypes.create_string_buffer(8)
for function, wanted in ((none, None), (old, 77)):
    base = (ctypes.c_void_p * 2)(ctypes.cast(function, ctypes.c_void_p).value, None)
    assert register(options, base) == wanted
assert asked == [17, 1]
assert register(options, None) is None
"""
    assert lines_of(code) == ["1 nomul needs ONNX Runtime 1.17 or newer"]


def test_attributes_out_of_range_are_refused_by_a_session() -> None:
    code = """
from tests.test_onnx_kernels import linear_session
large = 2**62
wrong = dict(version=(0, 2, -1, 2**32 + 1), planes=(0, -1, 9, 2**32 + 3), group=(0, -5), terms=(5, -1, 2**32 + 2),
    tied=(2, -1), offset=(3, -1, 2), rows=(0, -1, 2**31, large, -large, 9), inputs=(0, -1, 2**31, large, 200),
    mode=(-1, 3, 2**32, -2**32))
for name, values in wrong.items():
    for value in values:
        print(name, value, end=" ")
        told(lambda: linear_session(PACKED, None, **{name: value}))
told(lambda: linear_session(PACKED, None, rows=2**31 - 1, inputs=2**31 - 1, group=1, planes=8))
"""
    lines = lines_of(code)
    assert len(lines) == 34
    for line in lines[:-1]:
        assert any(word in line for word in ("layout", "planes", "group", "terms", "offset", "weight", "mode")), line
    assert "larger than any memory" in lines[-1]


def test_weights_and_activations_that_do_not_fit_are_refused_by_a_session() -> None:
    code = """
import onnx_ir
from onnx_ir import DataType
from tests.test_onnx_kernels import linear_session, session_of, value
for data in (PACKED.data[:0], PACKED.data[:-1], PACKED.data[:100], torch.cat([PACKED.data, PACKED.data])):
    told(lambda: linear_session(Packed(data.contiguous(), PACKED.layout), None))
def one(x, given, constants, skip=()):
    attributes = {k: v for k, v in dict(PACKED.layout.attributes(), mode=1).items() if k not in skip}
    node = onnx_ir.node("TiledLinear", [x, *given], attributes=attributes, domain="nomul")
    node.outputs[0].name, node.outputs[0].type = "y", onnx_ir.TensorType(DataType.FLOAT)
    node.outputs[0].shape = onnx_ir.Shape(("b", "t", 40))
    return session_of([node], [x, *(g for g in given if g.name not in constants)], [node.outputs[0]], constants)
x, w = value("x"), lambda kind=DataType.UINT8: value("w", kind, (PACKED.data.numel(),))
data = PACKED.data.numpy()
told(lambda: one(x, [w()], {}))
told(lambda: one(value("x"), [w(DataType.FLOAT)], {"w": data.astype(np.float32)}))
told(lambda: one(value("x", DataType.DOUBLE), [w()], {"w": data}))
told(lambda: one(value("x"), [w(), value("b", DataType.DOUBLE, (40,))], {"w": data, "b": np.zeros(40)}))
told(lambda: one(value("x"), [w()], {"w": data}, skip=("planes",)))
told(lambda: one(value("x"), [w()], {"w": data}, skip=("mode",)))
session = linear_session(PACKED, None)
for array in (np.zeros((1, 1, 0)), np.zeros((1, 1, 97)), np.zeros((1, 0, 95)), np.zeros((1, 96)), np.zeros(())):
    told(lambda: session.run(None, {"x": array.astype(np.float32)}))
told(lambda: session.run(None, {"x": np.zeros((1, 1, 96))}))
for bias in (torch.zeros(0), torch.zeros(39)):
    told(lambda: linear_session(PACKED, bias).run(None, {"x": np.zeros((1, 1, 96), np.float32)}))
for dims in ((0, 0, 96), (1, 0, 96), (0, 1, 96)):
    assert session.run(None, {"x": np.zeros(dims, np.float32)})[0].shape == (*dims[:2], 40)
"""
    lines = lines_of(code)
    assert len(lines) == 18
    assert all("its layout needs" in line for line in lines[:4]) and "constant" in lines[4]
    assert all("tensor(" in line for line in lines[5:8])
    assert "planes" in lines[8] and "mode" in lines[9]
    assert "the last dim of the activations must be 96" in lines[10]
    assert "the bias must have 40 values" in lines[17]


def test_rotations_that_do_not_fit_are_refused_by_a_session() -> None:
    code = """
import onnx_ir
from tests.test_onnx_kernels import session_of, value
def rotation(signs, *factors):
    inputs = [value("x"), value("s", dims=signs.shape)]
    inputs += [value(f"f{i}", dims=f.shape) for i, f in enumerate(factors)]
    constants = {"s": signs, **{f"f{i}": f for i, f in enumerate(factors)}}
    node = onnx_ir.node("Hadamard", inputs, attributes={"transposed": 0}, domain="nomul")
    node.outputs[0].name, node.outputs[0].type = "y", onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    node.outputs[0].shape = onnx_ir.Shape(("b", "t", "k"))
    session = session_of([node], inputs[:1], [node.outputs[0]], {k: v.astype(np.float32) for k, v in constants.items()})
    return lambda *dims: session.run(None, {"x": np.zeros(dims, np.float32)})[0].shape
ones = np.ones
told(lambda: rotation(ones(0), ones((2, 2))))
told(lambda: rotation(ones(4), ones((2, 3))))
told(lambda: rotation(ones(4), ones(4)))
told(lambda: rotation(ones(4)))
told(lambda: rotation(ones(4), ones((0, 0)))(1, 1, 4))
told(lambda: rotation(ones(4), ones((3, 3)))(1, 1, 4))
told(lambda: rotation(ones(4), ones((4, 4)), ones((4, 4)))(1, 1, 4))
told(lambda: rotation(ones(4), ones((8, 8)))(1, 1, 4))
fine = rotation(ones(4), ones((2, 2)))
told(lambda: fine(1, 1, 3))
told(lambda: fine(1, 1, 0))
assert fine(2, 0, 4) == (2, 0, 4)
"""
    lines = lines_of(code)
    assert len(lines) == 10 and "at least one sign" in lines[0] and "square" in lines[1] and "square" in lines[2]
    assert "order 0" in lines[4] and "do not divide" in lines[5] and "do not divide" in lines[6]
    assert "the last dim of the activations must be 4" in lines[8]


def test_model_files_that_are_cut_short_or_missing_are_told(tmp_path: Path) -> None:
    code = """
from backends.onnxruntime import OnnxRuntime, SessionOptions
from backends.onnxruntime.lowering import DATA_FILE, MODEL_FILE, emit_program, write_model
from backends.onnxruntime.session import library_for
from ir.errors import UnsupportedError
from tests.test_onnx_compressed import compressed
folder = Path(sys.argv[1])
program = compressed("llama", "rtn3")
write_model(emit_program(program), folder)
data, model = (folder / DATA_FILE), (folder / MODEL_FILE)
whole, graph = data.read_bytes(), model.read_bytes()
options = SessionOptions(threads=1, library=library_for(folder))
def opened():
    return OnnxRuntime(program, folder, options=options)
opened()
for size in (0, 1000, len(whole) // 2, len(whole) - 1):
    data.write_bytes(whole[:size])
    told(opened, UnsupportedError)
data.unlink()
told(opened, UnsupportedError)
data.write_bytes(whole)
for size in (0, 1, len(graph) // 2, len(graph) - 1):
    model.write_bytes(graph[:size])
    told(opened, UnsupportedError)
model.write_bytes(graph)
# Whatever the bytes of a weight, there is a result.
data.write_bytes(bytes(np.random.default_rng(1).integers(0, 256, len(whole), dtype=np.uint8)))
opened().forward(torch.tensor([[5, 6, 7]]))
"""
    lines = lines_of(code, tmp_path)
    assert len(lines) == 9 and all("ONNX Runtime cannot open the model" in line for line in lines)
    assert all("are out of bounds" in line for line in lines[:4])
    assert "model.onnx.data because: the file with the weights is not there" in lines[4]
    assert all("protobuf" in line.lower() for line in lines[5:])


def test_the_c_interface_refuses_null_pointers_and_wrong_sizes() -> None:
    code = """
from ctypes import POINTER, byref, c_int, c_int32, c_int64, c_void_p
from backends.native.library import _Layout, _struct
handle = load()._handle
shape = [POINTER(_Layout), c_int32, *[c_void_p] * 4, c_int64, c_int64, c_int64, c_void_p]
handle.nomul_rows.argtypes = shape
handle.nomul_prepare.argtypes = [shape[0], c_int32, c_void_p, c_int64, c_void_p]
handle.nomul_scratch_bytes.argtypes, handle.nomul_scratch_bytes.restype = [shape[0], c_int64, c_int32], c_int64
layout, data = _struct(PACKED.layout), PACKED.data.data_ptr()
l, x, y = byref(layout), torch.zeros(20, 96), torch.zeros(20, 40)
def refused(name, *arguments):
    code = getattr(handle, name)(*arguments)
    assert code, (name, arguments)
    print(name, handle.nomul_error().decode())
size = PACKED.data.numel()
refused("nomul_linear", None, 1, data, size, None, x.data_ptr(), 1, y.data_ptr(), 1)
refused("nomul_linear", l, 1, None, size, None, x.data_ptr(), 1, y.data_ptr(), 1)
refused("nomul_linear", l, 1, data, size, None, None, 1, y.data_ptr(), 1)
refused("nomul_linear", l, 1, data, size, None, x.data_ptr(), 1, None, 1)
refused("nomul_linear", l, 1, data, size - 1, None, x.data_ptr(), 1, y.data_ptr(), 1)
refused("nomul_linear", l, 1, data, size, None, x.data_ptr(), -1, y.data_ptr(), 1)
refused("nomul_linear", l, 1, data, size, None, x.data_ptr(), 2**62, y.data_ptr(), 1)
refused("nomul_linear", l, 1, data, size, None, x.data_ptr(), 1, y.data_ptr(), 0)
room = torch.zeros(handle.nomul_scratch_bytes(l, 1, 1) + 128, dtype=torch.uint8)
scratch = (room.data_ptr() + 63) // 64 * 64
for at in (None, scratch + 4):
    refused("nomul_prepare", l, 1, x.data_ptr(), 1, at)
    refused("nomul_rows", l, 1, data, None, x.data_ptr(), at, 1, 0, 32, y.data_ptr())
refused("nomul_prepare", l, 1, None, 1, scratch)
assert not handle.nomul_prepare(l, 1, x.data_ptr(), 1, scratch)
refused("nomul_rows", l, 1, None, None, x.data_ptr(), scratch, 1, 0, 32, y.data_ptr())
refused("nomul_rows", l, 1, data, None, x.data_ptr(), scratch, 1, 0, 32, None)
refused("nomul_rows", l, 1, data, None, None, scratch, 1, 0, 32, y.data_ptr())
for first, last in ((1, 32), (-32, 32), (0, 41), (32, 0), (64, 96)):
    refused("nomul_rows", l, 1, data, None, x.data_ptr(), scratch, 1, first, last, y.data_ptr())
    refused("nomul_decode", l, data, first, last, y.data_ptr())
refused("nomul_decode", l, data, 0, 32, None)
assert handle.nomul_scratch_bytes(l, 2**62, 1) == -1
for fields in ((1, 8, 1, 4, 0, 1, 2**31 - 1, 2**31 - 1), (1, 8, 1, 0, 0, 0, 2**31 - 1, 2**31 - 1)):
    assert handle.nomul_weight_bytes(byref(_Layout(*fields))) == -1, fields
assert handle.nomul_weight_bytes(byref(_Layout(1, 8, 64, 4, 0, 1, 2**20, 2**20))) > 2**40
signs, columns = torch.ones(4), torch.ones(2, 2)
sizes, places = (c_int64 * 1)(2), (c_void_p * 1)(columns.data_ptr())
good = [x.data_ptr(), 1, 4, signs.data_ptr(), 0, 1, sizes, places, y.data_ptr()]
assert not handle.nomul_hadamard(*good)
for place, value in ((0, None), (1, -1), (2, 0), (2, 3), (3, None), (5, 0), (6, None), (7, None), (8, None)):
    refused("nomul_hadamard", *good[:place], value, *good[place + 1:])
places[0] = None
refused("nomul_hadamard", *good)
"""
    lines = lines_of(code)
    assert len(lines) == 37 and all(len(line.split()) > 3 for line in lines)


@pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer needs address space without limit"
)
def test_more_threads_than_can_be_had_give_the_same() -> None:
    code = """
import resource
packed = pack(shift_codes(256 * 60, 32, 1, 32, 1, False, seed=1, spread=1))
x, library = torch.ones(2, 32), load()
wanted = library.linear(x, packed)
assert torch.equal(library.linear(x, packed, threads=2**40), wanted)
used = 4096 * int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, resource.RLIM_INFINITY))
assert torch.equal(library.linear(x, packed, threads=60), wanted)
print("same")
"""
    assert lines_of(code) == ["same"]


def test_any_bytes_are_a_weight_at_every_level() -> None:
    code = """
library, generator = load(), torch.Generator().manual_seed(1)
for level in library.levels:
    library.use(level)
    for codes in (
        *(shift_codes(33, 100, p, 40, t, o, seed=1, spread=1) for p in (1, 3, 8) for t in range(5) for o in (0, 1)),
        *(quant_codes(33, 100, b, 40, z, seed=1) for b in (1, 4, 8) for z in (False, True)),
    ):
        layout = pack(codes).layout
        data = torch.randint(0, 256, (layout.weight_bytes,), dtype=torch.uint8, generator=generator)
        for tokens in (1, 5, 30):
            for mode in MODES:
                library.linear(torch.ones(tokens, 100), Packed(data, layout), torch.ones(33), mode)
        library.decode(Packed(data, layout))
print("done")
"""
    assert lines_of(code) == ["done"]


@pytest.fixture
def library() -> Library:
    """The library at its fastest level, whatever an earlier test chose."""
    found = load()
    found.use(found.levels[-1])
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38, 1e-42])
def test_a_token_that_is_not_finite_leaves_the_others_alone(bad: float, mode: str, library: Library) -> None:
    for offset, tokens in ((False, 3), (False, 30), (True, 3), (True, 30)):
        packed = pack(shift_codes(70, 300, 3, 64, 2, offset, seed=1, spread=2))
        others = [t for t in range(tokens) if t != 1]
        x = torch.randn(tokens, 300, generator=torch.Generator().manual_seed(0))
        changed = x.clone()
        changed[1, 37] = bad
        for level in library.levels:
            library.use(level)
            wanted, got = (library.linear(v, packed, None, mode) for v in (x, changed))
            assert torch.equal(got[others], wanted[others])
            if not torch.isfinite(changed).all():
                assert not bool(got[1].isfinite().any())


def _layout(**changes: int) -> Packed:
    packed = pack(shift_codes(40, 96, 3, 32, 2, True, seed=3, spread=2))
    return Packed(packed.data, Layout(**{**packed.layout.attributes(), **changes}))


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda lib: lib.linear(torch.zeros(1, 96), _layout(version=2)), UnsupportedError, "layout version 2"),
        (lambda lib: lib.linear(torch.zeros(1, 96), _layout(planes=2**32 + 3)), UsageError, "planes = 4294967299"),
        (lambda lib: lib.linear(torch.zeros(1, 96), _layout(planes=0)), UnsupportedError, "1 to 8 planes, not 0"),
        (lambda lib: lib.linear(torch.zeros(1, 96), _layout(rows=400)), UsageError, "bytes of its layout"),
        (lambda lib: lib.decode(_layout(rows=400)), UsageError, "bytes of its layout"),
        (lambda lib: lib.decode(_layout(rows=2**31 - 1, inputs=2**31 - 1, group=1)), UnsupportedError, "any memory"),
        (lambda lib: lib.linear(torch.zeros(1, 96), _layout(), threads=0), UsageError, "there cannot be 0 threads"),
        (lambda lib: lib.linear(torch.zeros(()), _layout()), UsageError, "activations do not fit"),
        (lambda lib: lib.linear(torch.zeros(1, 96, device="meta"), _layout()), UsageError, "on meta"),
        (lambda lib: lib.linear(torch.zeros(1, 96), _layout(), torch.zeros(40).double()), UsageError, "bias"),
        (
            lambda lib: lib.linear(torch.zeros(1, 96), Packed(_layout().data.view(torch.int8), _layout().layout)),
            UsageError,
            "contiguous uint8",
        ),
        (
            lambda lib: lib.decode(Packed(_layout().data.repeat_interleave(2)[::2], _layout().layout)),
            UsageError,
            "contiguous uint8",
        ),
        (lambda lib: lib.hadamard(torch.zeros(1, 4), torch.ones(4), []), UnsupportedError, "no tokens, channels"),
        (lambda lib: lib.hadamard(torch.zeros(1, 4), torch.ones(0), []), UsageError, "signs do not fit"),
        (lambda lib: lib.hadamard(torch.zeros(1, 5), torch.ones(4), [torch.ones(4, 4)]), UsageError, "activations"),
        (lambda lib: lib.hadamard(torch.zeros(1, 4).double(), torch.ones(4), []), UsageError, "activations"),
        (lambda lib: lib.hadamard(torch.zeros(1, 4), torch.ones(4), [torch.ones(4)]), UsageError, "square"),
        (lambda lib: lib.hadamard(torch.zeros(1, 4), torch.ones(4), [torch.ones(2, 2).half()]), UsageError, "square"),
        (lambda lib: lib.hadamard(torch.zeros(1, 4), torch.ones(4), [torch.ones(3, 3)]), UnsupportedError, "divide"),
    ],
)
def test_python_arguments_that_do_not_fit_are_refused(
    call: Callable[[Library], object], kind: type[Exception], text: str, library: Library
) -> None:
    with pytest.raises(kind, match=text):
        call(library)


def test_empty_inputs_give_empty_results(library: Library) -> None:
    packed = _layout()
    for dims in ((0, 96), (2, 0, 96), (0, 0, 96)):
        assert library.linear(torch.zeros(dims), packed).shape == (*dims[:-1], 40)
        assert library.hadamard(torch.zeros(*dims[:-1], 4), torch.ones(4), [torch.ones(2, 2)]).shape == (*dims[:-1], 4)


def test_strided_arguments_are_read_right(library: Library) -> None:
    packed, x = _layout(), torch.randn(3, 192)
    bias = torch.randn(80)
    wanted = library.linear(x[:, ::2].clone(), packed, bias[::2].clone())
    assert torch.equal(library.linear(x[:, ::2], packed, bias[::2]), wanted)
    factor = torch.randn(4, 4)
    turned = library.hadamard(x[:, :4], torch.ones(4), [factor.T])
    assert torch.equal(turned, library.hadamard(x[:, :4].clone(), torch.ones(4), [factor.T.contiguous()]))
