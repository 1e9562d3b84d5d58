"""`install` puts flash-attn's modules under their own names, never over real ones; padding goes and comes back.

Each check of an installation runs in a fresh interpreter, since what other libraries find out about flash-attn they
remember.
"""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from tilefold.drop_in.flash_attn import (  # noqa: E402
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
)


def fresh(code, *path):
    """Run in a new interpreter, with these folders first on its path."""
    more = f"import sys; sys.path[:0] = {list(map(str, path))!r}\n"
    ran = subprocess.run(
        [sys.executable, "-c", more + textwrap.dedent(code)], capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_importing_the_package_installs_nothing():
    fresh("""
        import importlib.util, sys
        import tilefold.drop_in.flash_attn
        assert "flash_attn" not in sys.modules and importlib.util.find_spec("flash_attn") is None
        assert "torch" not in sys.modules
    """)


def test_every_name_is_found():
    fresh("""
        import importlib.util, sys
        import tilefold.drop_in.flash_attn as fa
        from tilefold.drop_in.flash_attn import bert_padding, fa2, fa3, fa4
        fa.install()
        fa.install()
        assert sys.meta_path.count(sys.meta_path[-1]) == 1
        assert importlib.util.find_spec("flash_attn").origin == "tilefold.drop_in.flash_attn.fa2"
        import flash_attn, flash_attn_interface
        from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
        from flash_attn.bert_padding import unpad_input, pad_input, index_first_axis, index_put_first_axis
        from flash_attn.flash_attn_interface import flash_attn_varlen_qkvpacked_func
        from flash_attn.cute import flash_attn_func as four
        from flash_attn.cute.interface import flash_attn_varlen_func as four_varlen, flash_attn_combine
        from flash_attn_interface import flash_attn_func as three, flash_attn_combine as combine
        assert flash_attn_func is fa2.flash_attn_func is fa.flash_attn_func
        assert (three, four) == (fa3.flash_attn_func, fa4.flash_attn_func)
        assert (combine, flash_attn_combine) == (fa3.flash_attn_combine, fa4.flash_attn_combine)
        assert unpad_input is bert_padding.unpad_input
        assert flash_attn.bert_padding.unpad_input is unpad_input
        for module in (flash_attn, flash_attn.cute, flash_attn_interface, flash_attn.bert_padding):
            assert module.__version__ == fa.__version__ == "2.8.3+tilefold"
            assert all(hasattr(module, name) for name in module.__all__) and module.__doc__
        space = {}
        exec("from flash_attn import *", space)
        assert space["flash_attn_func"] is flash_attn_func
        assert "tilefold" not in sys.modules["flash_attn"].__all__
    """)


def test_what_is_not_here_says_so():
    says = fresh("""
        from importlib.metadata import PackageNotFoundError, version
        from tilefold.drop_in.flash_attn import install
        install()
        import flash_attn
        for statement in (
            "import flash_attn.layers.rotary", "import flash_attn.ops", "from flash_attn import flash_attn_gpu",
            "flash_attn.flash_attn_cuda", "import flash_attn_interface.other",
        ):
            try:
                exec(statement)
            except (ImportError, AttributeError) as error:
                print(type(error).__name__, error)
        try:
            version("flash_attn")
        except PackageNotFoundError:
            print("no distribution")
    """).splitlines()
    assert says[0].startswith(
        "ModuleNotFoundError flash_attn.layers is not here: this flash_attn is tilefold's"
    )
    assert says[1].startswith("ModuleNotFoundError flash_attn.ops is not here")
    assert says[2].startswith("ImportError cannot import name 'flash_attn_gpu' from 'flash_attn'")
    assert says[3].startswith(
        "AttributeError module 'flash_attn' is tilefold's, for the CPU, and has no 'flash_attn_cuda'"
    )
    assert says[4].startswith("ModuleNotFoundError")
    assert says[5] == "no distribution"


def test_uninstall_takes_all_of_it_back():
    fresh("""
        import importlib.util, sys
        from tilefold.drop_in.flash_attn import install, uninstall
        before = list(sys.meta_path)
        uninstall()
        install()
        import flash_attn.cute.interface, flash_attn.bert_padding, flash_attn_interface
        kept = flash_attn.flash_attn_func
        uninstall()
        assert sys.meta_path == before
        assert not [name for name in sys.modules if name.startswith("flash_attn")]
        assert importlib.util.find_spec("flash_attn") is None
        import torch
        assert kept(*torch.randn(3, 1, 4, 2, 8)).shape == (1, 4, 2, 8)
        install()
        from flash_attn import flash_attn_func
        assert flash_attn_func is kept
    """)


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_interface"])
def test_a_real_one_is_left_alone(tmp_path, name):
    (tmp_path / f"{name}.py").write_text("flash_attn_func = 'real'")
    fresh(
        f"""
        import sys
        from tilefold.drop_in.flash_attn import install, uninstall
        before = list(sys.meta_path)
        for loaded in (False, True):
            try:
                install()
            except RuntimeError as error:
                assert str(error).startswith("{name} is there already (") and "{name}.py" in str(error)
            else:
                raise AssertionError
            import {name}
        uninstall()
        assert sys.meta_path == before and {name}.flash_attn_func == "real" and "{name}" in sys.modules
        """,
        tmp_path,
    )


def test_one_that_comes_later_wins(tmp_path):
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "flash_attn.py").write_text("flash_attn_func = 'real'")
    fresh(f"""
        from tilefold.drop_in.flash_attn import install
        install()
        sys.path.insert(0, {str(tmp_path / "later")!r})
        from flash_attn import flash_attn_func
        assert flash_attn_func == "real"
    """)


def test_transformers_does_not_take_it_for_the_real_one():
    pytest.importorskip("transformers", reason="transformers is not installed")
    fresh("""
        from tilefold.drop_in.flash_attn import install
        install()
        from transformers.utils import is_flash_attn_2_available, is_flash_attn_greater_or_equal
        assert not is_flash_attn_2_available() and not is_flash_attn_greater_or_equal("2.1")
    """)


def test_the_page_about_it_runs():
    text = (Path(__file__).parents[2] / "docs" / "flash_attn.md").read_text()
    (source,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    fresh(source + "\nassert padded.shape == q.shape and float(k_cache[:, 2].abs().sum()) > 0")


# ---- padding -------------------------------------------------------------------------------------------------

MASK = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_unpad_and_pad(kind):
    x = torch.randn(3, 4, 2, 5, requires_grad=True)
    rows, indices, cu_seqlens, longest, used = unpad_input(x, MASK.to(kind))
    chosen = [(b, j) for b in range(3) for j in range(4) if MASK[b, j]]
    assert torch.equal(rows, torch.stack([x[at] for at in chosen]))
    assert indices.tolist() == [4 * b + j for b, j in chosen]
    assert (cu_seqlens.tolist(), cu_seqlens.dtype) == ([0, 3, 3, 7], torch.int32)
    assert (longest, type(longest)) == (4, int)
    assert (used.tolist(), used.dtype) == ([3, 0, 4], torch.int32)
    back = pad_input(rows, indices, 3, 4)
    assert torch.equal(back, x * MASK[..., None, None])
    weight = torch.randn(3, 4, 2, 5)
    (back * weight).sum().backward()
    assert torch.equal(x.grad, weight * MASK[..., None, None])


def test_unused_rows_are_kept_and_counted_apart():
    unused = torch.tensor([[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    rows, indices, cu_seqlens, longest, used = unpad_input(torch.randn(3, 4, 5), MASK, unused)
    assert (cu_seqlens.tolist(), longest, used.tolist()) == ([0, 4, 5, 9], 4, [3, 0, 4])
    assert indices.tolist() == [0, 1, 2, 3, 5, 8, 9, 10, 11]
    assert rows.shape == (9, 5)


def test_rows_by_index():
    x = torch.randn(6, 3, requires_grad=True)
    at = torch.tensor([4, 0, 5])
    some = index_first_axis(x, at)
    assert np.array_equal(some.detach().numpy(), x.detach().numpy()[[4, 0, 5]])
    some.sum().backward()
    assert x.grad.sum(1).tolist() == [3, 0, 0, 0, 3, 3]
    values = torch.randn(3, 2, requires_grad=True)
    whole = index_put_first_axis(values, at, 6)
    assert whole[1:4].abs().sum() == 0
    assert torch.equal(whole[at], values)
    (whole * 2).sum().backward()
    assert torch.equal(values.grad, torch.full((3, 2), 2.0))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: index_first_axis(torch.ones(3, 2), torch.tensor([3])), "indices must lie within 0 and 2, got 3"),
        (lambda: index_put_first_axis(torch.ones(1, 2), torch.tensor([-1]), 3), "within 0 and 2, got -1"),
        (lambda: unpad_input(torch.ones(2, 3, 4), torch.ones(2, 4)), r"attention_mask must have shape \(2, 3\)"),
        (lambda: pad_input(torch.ones(2, 4), torch.tensor([0]), 1, 3), r"indices must have shape \(2,\)"),
    ],
)  # fmt: skip
def test_wrong_padding(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_a_padded_batch_through_packed_attention():
    """What a model does: unpad, attend, pad; rows that are no padding are those of each sequence alone."""
    from tilefold.drop_in.flash_attn import flash_attn_func, flash_attn_varlen_func

    x = torch.randn(3, 4, 2, 8)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    rows, indices, cu, longest, _ = unpad_input(x, mask)
    out = pad_input(
        flash_attn_varlen_func(rows, rows, rows, cu, cu, longest, longest, causal=True), indices, 3, 4
    )
    for b, n in enumerate((3, 1, 4)):
        alone = x[b : b + 1, :n]
        assert torch.equal(out[b : b + 1, :n], flash_attn_func(alone, alone, alone, causal=True))
        assert not out[b, n:].any()
