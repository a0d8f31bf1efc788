"""The grammar: what is written is what is read, and every mistake says which part is wrong."""

import re

import pytest
from hypothesis import given, strategies as st

import slimjax
from slimjax.scheme import BASES, Scheme, parse_scheme, parse_schemes


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("kv:bf16", {"basis": "kv", "codec": "bf16", "option": 0}),
        ("k:bf16", {"basis": "k", "codec": "bf16", "option": 2}),
        ("k1:int16", {"basis": "k", "codec": "int16", "option": 1}),
        ("k:int16+16", {"basis": "k", "codec": "int16", "extra": 16}),
        ("x1:fp16", {"basis": "x", "codec": "fp16", "option": 1}),
        ("v:int8@exact", {"basis": "v", "codec": "int8", "softmax": "exact"}),
    ],
)
def test_parse(text, fields):
    scheme = parse_scheme(text)
    assert {name: getattr(scheme, name) for name in fields} == fields


@given(
    basis=st.sampled_from(sorted(BASES)),
    codec=st.sampled_from(["float32", "bf16", "fp16", "int16", "int8"]),
    option=st.sampled_from([1, 2]),
    extra=st.integers(0, 64),
)
def test_text_and_scheme_are_the_same_thing(basis, codec, option, extra):
    scheme = Scheme(
        basis=basis,
        codec=codec,
        option=0 if basis == "kv" else option,
        extra=extra if basis == "k" else 0,
    )
    assert parse_scheme(str(scheme)) == scheme
    assert len({scheme, parse_scheme(str(scheme))}) == 1


def test_several():
    cross, own = parse_schemes("e:bf16,k:int16+16")
    assert (cross.basis, own.basis, own.extra) == ("e", "k", 16)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("k", "not of the form"),
        ("q:bf16", "unknown basis 'q'"),
        ("k:int61", "did you mean 'int16'"),
        ("kv2:bf16", "has no option 2"),
        ("k3:bf16", "has no option 3"),
        ("kv:bf16+4", "belong to basis k"),
        ("kv:int88", "unknown codec 'int88'"),
        ("kv:bf16/64", "codec 'bf16' has no groups (group=64)"),
        ("kv:bf16/0", "at least one member"),
        ("k:bf16@sofmax", "unknown softmax 'sofmax'"),
        ("k:bf16 +4", "not of the form"),
        ("", "not of the form"),
    ],
)
def test_mistakes(text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        parse_scheme(text)
    assert repr(text) in str(error.value)


def test_what_parses_but_cannot_serve_a_layer_is_refused_with_a_reason():
    def spec(scheme):
        return slimjax.DecodeSpec(scheme=parse_scheme(scheme), heads=2, kv_heads=2, head_dim=4, width=8)

    for scheme, reason in [
        ("k:int16+8", "no fewer than"),
        ("e:bf16", "no input in common"),
        ("kr:bf16", "use k$"),
    ]:
        with pytest.raises(NotImplementedError, match=reason):
            slimjax.init_cache(spec(scheme), batch=1, capacity=4)
