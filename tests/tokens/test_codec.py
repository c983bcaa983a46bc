"""The codecs against their formulas written out, what codes must not depend on, and what learning refuses."""

import itertools
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from fastmae.errors import InputError
from fastmae.outside.codec_names import parse_codec
from fastmae.tokens.codec import code_layout, learns, load_codec, peak_of
from fastmae.tokens.learn import deal, learn_codec, learn_from, share_variance

C = 48
# 13 does not divide 48: groups of 4 directions, the last ones of 3.
NAMES = ["fp32", "fp16", "int8", "pq1", "pq12", "pq13"]


def correlated(count, seed, dim=C):
    """float32 [count, dim]. A few directions hold most of the variance, and channels differ in mean and std."""
    mixing = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(0)))[0]
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, dim + 1) ** -0.7
    centres = torch.randn(40, dim, generator=torch.Generator().manual_seed(1))
    clumps = centres[torch.randint(40, (count,), generator=generator)]
    tokens = (0.6 * torch.randn(count, dim, generator=generator) + clumps) * spectrum @ mixing
    return 20 * tokens * torch.linspace(0.5, 2, dim) + torch.linspace(-3, 3, dim)


@pytest.fixture(scope="module")
def codecs():
    sample = correlated(4000, seed=2)
    return {name: learn_codec(name, sample, seed=0) for name in NAMES}


def relative_error(codec, tokens):
    decoded = codec.decode(torch.from_numpy(codec.encode(tokens)))
    return float(((decoded - tokens).norm(dim=-1) / tokens.norm(dim=-1)).mean())


def by_formula(tensors, codes):
    """The module docstring's formula, token by token and group by group."""
    learnt = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    groups, _, width = learnt["centroids"].shape
    tokens = np.zeros((len(codes), len(learnt["offset"])))
    for row, code in enumerate(codes):
        for m in range(groups):
            tokens[row] += learnt["centroids"][m, code[m]] @ learnt["inverse"][m * width : (m + 1) * width]
    return learnt["offset"] + tokens


@pytest.mark.parametrize("name", ["pq12", "pq13"])
def test_a_code_is_the_nearest_centroid_of_its_group(name, codecs):
    tokens = correlated(150, seed=3)
    learnt = {key: tensor.astype(np.float64) for key, tensor in codecs[name].tensors().items()}
    groups, _, width = learnt["centroids"].shape
    rotated = (tokens.double().numpy() - learnt["offset"]) @ learnt["forward"]
    codes = codecs[name].encode(tokens)
    for token, code in zip(rotated, codes, strict=True):
        for m in range(groups):
            distances = ((learnt["centroids"][m] - token[m * width : (m + 1) * width]) ** 2).sum(1)
            assert distances[code[m]] <= distances.min() + 1e-4


@pytest.mark.parametrize("name", ["pq1", "pq12", "pq13"])
def test_a_decoded_token_is_the_sum_of_its_codes_rows(name, codecs):
    codec = codecs[name]
    codes = codec.encode(correlated(100, seed=3))
    expected = torch.from_numpy(by_formula(codec.tensors(), codes)).float()
    torch.testing.assert_close(codec.decode(torch.from_numpy(codes)), expected, rtol=2e-3, atol=2e-2)


def test_pq_encodes_tokens_beyond_the_range_of_fp16():
    sample = 1e6 * correlated(1000, seed=2)
    codec = learn_codec("pq24", sample, seed=0)
    assert relative_error(codec, sample) < 0.2


def test_decoding_by_sums_and_by_product_agree(codecs):
    quantiser = codecs["pq12"].quantiser
    codes = torch.from_numpy(codecs["pq12"].encode(correlated(300, seed=3)))
    torch.testing.assert_close(
        quantiser.decode_by_sums(codes), quantiser.decode_by_product(codes), rtol=2e-3, atol=2e-2
    )


def test_decoding_is_the_same_under_autocast(codecs):
    quantiser = codecs["pq12"].quantiser
    codes = torch.from_numpy(codecs["pq12"].encode(correlated(30, seed=3)))
    for decode in (quantiser.decode_by_sums, quantiser.decode_by_product):
        with torch.autocast("cpu", torch.bfloat16):
            inside = decode(codes)
        assert torch.equal(inside, decode(codes))


def test_int8_rounds_to_the_nearest_of_256_steps(codecs):
    tokens = correlated(200, seed=3)
    offset, scale = (codecs["int8"].tensors()[name] for name in ("offset", "scale"))
    codes = codecs["int8"].encode(tokens)
    expected = np.clip(np.rint((tokens.numpy() - offset) / scale), 0, 255)
    np.testing.assert_array_equal(codes, expected)
    torch.testing.assert_close(
        codecs["int8"].decode(torch.from_numpy(codes)), torch.from_numpy(offset + scale * codes.astype(np.float32))
    )
    unclipped = (expected > 0) & (expected < 255)
    assert unclipped.mean() > 0.999
    error = np.abs(codecs["int8"].decode(torch.from_numpy(codes)).numpy() - tokens.numpy())
    assert (error <= 0.501 * scale)[unclipped].all()


def test_one_outlying_token_does_not_widen_int8s_range():
    sample = correlated(4000, seed=2)
    calm = learn_codec("int8", sample, seed=0).tensors()["scale"]
    sample[17] = 1e6
    np.testing.assert_allclose(learn_codec("int8", sample, seed=0).tensors()["scale"], calm, rtol=0.05)


def test_int8_clamps_numbers_beyond_its_range(codecs):
    far = torch.stack([torch.full((C,), -1e9), torch.full((C,), 1e9)])
    assert np.array_equal(codecs["int8"].encode(far), np.repeat([[0], [255]], C, axis=1))


@pytest.mark.parametrize("name", NAMES)
def test_codes_have_the_layout_that_code_layout_predicts(name, codecs):
    code_dim, dtype = code_layout(name, C)
    codes = codecs[name].encode(correlated(2 * 3 * 3, seed=3).reshape(2, 3, 3, C))
    assert (codes.shape, codes.dtype) == ((2, 3, 3, code_dim), dtype)
    assert (codecs[name].code_dim, codecs[name].dtype) == (code_dim, dtype)
    tokens = codecs[name].decode(torch.from_numpy(codes))
    assert (tokens.shape, tokens.dtype) == ((2, 3, 3, C), torch.float32)


def test_the_layout_follows_from_the_name():
    assert code_layout("fp32", 384) == (384, np.float32)
    assert code_layout("fp16", 384) == (384, np.float16)
    assert code_layout("int8", 384) == (384, np.uint8)
    assert code_layout("pq48", 384) == (48, np.uint8)
    assert [learns(name) for name in NAMES] == [False, False, True, True, True, True]


def test_fp32_and_fp16_give_back_the_numbers_themselves():
    tokens = correlated(64, seed=3)
    fp32, fp16 = load_codec("fp32", C, {}), load_codec("fp16", C, {})
    assert torch.equal(fp32.decode(torch.from_numpy(fp32.encode(tokens))), tokens)
    assert torch.equal(fp16.decode(torch.from_numpy(fp16.encode(tokens))), tokens.half().float())
    assert fp32.tensors() == fp16.tensors() == learn_codec("fp16", tokens, seed=0).tensors() == {}


@pytest.mark.parametrize("name", NAMES)
def test_encoding_decoded_tokens_gives_the_same_codes(name, codecs):
    codes = codecs[name].encode(correlated(500, seed=3))
    again = codecs[name].encode(codecs[name].decode(torch.from_numpy(codes)))
    # pq decodes with float16's precision, so two centroids that nearly coincide may swap.
    assert (again != codes).mean() < 1e-3


def test_more_bytes_a_token_lose_less():
    sample, held_out = correlated(2000, seed=2), correlated(500, seed=3)
    errors = [
        relative_error(learn_codec(name, sample, seed=0), held_out)
        for name in ("pq2", "pq4", "pq8", "pq16", "pq24", "int8", "fp16")
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.3 and errors[4] < 0.15 and errors[5] < 0.02


def test_the_rotation_loses_less_than_plain_product_quantisation(codecs):
    import faiss

    sample, held_out = correlated(4000, seed=2), correlated(500, seed=3)
    plain = faiss.ProductQuantizer(C, 12, 8)
    plain.cp.min_points_per_centroid = 1
    plain.train(sample.numpy())
    decoded = torch.from_numpy(plain.decode(plain.compute_codes(held_out.numpy())))
    plain_error = float(((decoded - held_out).norm(dim=1) / held_out.norm(dim=1)).mean())
    assert relative_error(codecs["pq12"], held_out) < 0.8 * plain_error


@pytest.mark.parametrize("groups", [1, 12, 13, C])
def test_the_rotation_contains_each_principal_direction_once(groups):
    tokens = correlated(2000, seed=2)
    tokens = tokens - tokens.mean(0)
    rotation = share_variance(tokens, groups)
    directions = rotation[rotation.norm(dim=1) > 0]
    torch.testing.assert_close(directions @ directions.T, torch.eye(C), rtol=0, atol=1e-5)
    covariance = (tokens @ directions.T).T @ (tokens @ directions.T)
    off_diagonal = covariance - covariance.diag().diag()
    assert off_diagonal.abs().max() < 1e-4 * covariance.max()
    assert all((group.norm(dim=1) > 0).any() for group in rotation.unflatten(0, (groups, -1)))


def test_loads_are_dealt_out_so_that_the_groups_sums_are_equal():
    loads = [9.0, 7.0, 5.0, 4.0, 3.0, 2.0, 1.0, 1.0]
    members = deal(loads, groups=2, width=4)
    assert sorted(itertools.chain(*members)) == list(range(8))
    assert [sum(loads[index] for index in group) for group in members] == [16.0, 16.0]
    assert all(len(group) <= 3 for group in deal(loads, groups=3, width=3))


@pytest.mark.parametrize("name", NAMES)
def test_codes_do_not_depend_on_the_batch(name, codecs):
    tokens = correlated(333, seed=3)
    whole = codecs[name].encode(tokens)
    for size in (1, 7, 64, 200):
        assert np.array_equal(np.concatenate([codecs[name].encode(part) for part in tokens.split(size)]), whole)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    assert np.array_equal(codecs[name].encode(tokens[order]), whole[order])
    assert codecs[name].encode(tokens[:0]).shape == (0, codecs[name].code_dim)
    assert codecs[name].decode(torch.from_numpy(whole[:0])).shape == (0, C)


ELSEWHERE = """
import sys, torch
from safetensors.numpy import load_file, save_file
from fastmae.tokens.codec import load_codec
from fastmae.tokens.learn import learn_codec
assert "faiss" not in sys.modules, "only learning needs faiss"
torch.set_num_threads(3)
inputs, out = load_file(sys.argv[1]), {}
sample, tokens = (torch.from_numpy(inputs.pop(name)) for name in ("sample", "tokens"))
for name in ("int8", "pq13"):
    learnt = {key.removeprefix(name): value for key, value in inputs.items() if key.startswith(name)}
    out[name + "codes"] = load_codec(name, tokens.shape[-1], learnt).encode(tokens)
assert "faiss" not in sys.modules, "only learning needs faiss"
for name in ("int8", "pq13"):
    out |= {name + key: value for key, value in learn_codec(name, sample, seed=0).tensors().items()}
assert torch.get_num_threads() == 3
save_file(out, sys.argv[2])
"""


@pytest.mark.slow
def test_another_process_with_more_threads_learns_the_same_bytes_and_encodes_the_same_codes(codecs, tmp_path):
    tokens = correlated(1000, seed=3)
    inputs = {"sample": correlated(4000, seed=2).numpy(), "tokens": tokens.numpy()}
    learnt = {name + key: value for name in ("int8", "pq13") for key, value in codecs[name].tensors().items()}
    save_file(inputs | learnt, tmp_path / "in.safetensors")
    files = [tmp_path / "in.safetensors", tmp_path / "out.safetensors"]
    subprocess.run([sys.executable, "-c", ELSEWHERE, *files], check=True)
    out = load_file(tmp_path / "out.safetensors")
    for name in ("int8", "pq13"):
        assert np.array_equal(out.pop(name + "codes"), codecs[name].encode(tokens))
    assert {key: value.tobytes() for key, value in out.items()} == {
        key: value.tobytes() for key, value in learnt.items()
    }


def test_another_seed_starts_the_clustering_elsewhere(codecs):
    other = learn_codec("pq12", correlated(4000, seed=2), seed=2**40 + 1).tensors()
    assert not np.array_equal(other["centroids"], codecs["pq12"].tensors()["centroids"])
    assert np.array_equal(other["inverse"], codecs["pq12"].tensors()["inverse"])


@pytest.mark.parametrize("name", NAMES)
def test_a_codec_is_restored_from_its_tensors(name, codecs):
    loaded = load_codec(name, C, codecs[name].tensors())
    tokens = correlated(100, seed=3)
    codes = codecs[name].encode(tokens)
    assert np.array_equal(loaded.encode(tokens), codes)
    assert torch.equal(loaded.decode(torch.from_numpy(codes)), codecs[name].decode(torch.from_numpy(codes)))


@pytest.mark.parametrize("name", NAMES)
def test_a_pickled_codec_leaves_out_its_copies_and_tables(name, codecs):
    codes = torch.from_numpy(codecs[name].encode(correlated(10, seed=3)))
    codecs[name].decode(codes)
    codecs[name].decode(codes.to("meta"))
    pickled = pickle.dumps(codecs[name])
    learnt = sum(tensor.nbytes for tensor in codecs[name].tensors().values())
    assert len(pickled) < learnt + 2000
    assert torch.equal(pickle.loads(pickled).decode(codes), codecs[name].decode(codes))


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_decoded_on_the_device_of_the_codes(name, codecs):
    codes = torch.from_numpy(codecs[name].encode(correlated(10, seed=3))).to("meta")
    assert codecs[name].decode(codes).device.type == "meta"


def test_every_byte_is_a_code_and_other_shapes_and_dtypes_are_refused(codecs):
    every = torch.arange(256, dtype=torch.uint8)
    assert codecs["pq12"].decode(every[:, None].expand(256, 12)).isfinite().all()
    for wrong in (torch.full((2, 12), 256), torch.full((2, 12), -1, dtype=torch.int8), every[:11]):
        with pytest.raises(ValueError, match=r"pq12 has 12 torch\.uint8"):
            codecs["pq12"].decode(wrong)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_encoding_refuses_tokens_that_are_not_finite(name, value, codecs):
    tokens = correlated(10, seed=3)
    tokens[7, 5] = value
    with pytest.raises(InputError, match="NaN or infinity"):
        codecs[name].encode(tokens)


def test_fp16_refuses_numbers_beyond_its_range():
    with pytest.raises(InputError, match="--codec fp32"):
        load_codec("fp16", C, {}).encode(torch.full((2, C), 7e4))


def test_numbers_beyond_any_networks_are_refused():
    with pytest.raises(InputError, match=r"reach 1\.1e\+09"):
        load_codec("fp32", C, {}).encode(torch.full((2, C), 1.1e9))
    scale = {"offset": np.zeros(C, np.float32), "scale": np.full(C, 1e8, np.float32)}
    with pytest.raises(InputError, match=r"decodes tokens beyond 1e\+09"):
        load_codec("int8", C, scale)


@pytest.mark.parametrize(
    "name",
    ["pq", "pq0", "pq048", "pqx", "pq-4", "pq 48", "pq48 ", "pq48\n", "PQ48", "pq٤", "pq999999", "int4", "", "bf16"],
)
def test_an_unknown_codec_name_is_refused_with_the_known_ones(name):
    for function in (parse_codec, learns, lambda name: code_layout(name, C), lambda name: load_codec(name, C, {})):
        with pytest.raises(InputError, match="fp16, fp32, int8, or pq<M>"):
            function(name)


def test_more_bytes_than_channels_are_refused():
    with pytest.raises(InputError, match=r"--codec pq49: .*pq48"):
        code_layout("pq49", C)
    assert code_layout("pq48", C) == (48, np.uint8)


@pytest.mark.parametrize(("name", "least"), [("int8", 2), ("pq12", 256)])
def test_a_sample_that_is_too_small_or_not_finite_is_refused(name, least):
    with pytest.raises(InputError, match=rf"--codec {name}: {least - 1} token"):
        learn_codec(name, correlated(least - 1, seed=2), seed=0)
    sample = correlated(least, seed=2)
    learn_codec(name, sample, seed=0)
    sample[1, 0] = float("nan")
    with pytest.raises(InputError, match="NaN or infinity"):
        learn_codec(name, sample, seed=0)


@pytest.mark.parametrize("name", ["int8", "pq12", "pq48"])
def test_learning_from_a_small_or_constant_sample_prints_nothing(name, capfd):
    for sample in (correlated(256, seed=2), torch.full((300, C), 5.0), torch.zeros(300, C)):
        sample[:, 3] = 1.0  # a dead channel
        codec = learn_codec(name, sample, seed=0)
        decoded = codec.decode(torch.from_numpy(codec.encode(sample)))
        torch.testing.assert_close(decoded[:, 3], sample[:, 3], rtol=0, atol=0.1)
        assert codec.decode(torch.from_numpy(codec.encode(1e3 + 1e3 * sample))).isfinite().all()
    assert capfd.readouterr() == ("", "")


def test_without_faiss_only_learning_pq_fails_and_names_the_package_to_install(codecs, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    sample = correlated(300, seed=2)
    with pytest.raises(InputError, match=r"--codec pq12: .*pip install 'fastmae\[pq\]'"):
        learn_codec("pq12", sample, seed=0)
    codec = load_codec("pq12", C, codecs["pq12"].tensors())
    assert codec.decode(torch.from_numpy(codec.encode(sample))).shape == sample.shape
    learn_codec("int8", sample, seed=0)


DAMAGE = {
    "gone": lambda tensor: None,
    "of another shape": lambda tensor: tensor[:-1],
    "of another rank": lambda tensor: tensor[None],
    "a single number": lambda tensor: tensor.reshape(-1)[:1].reshape(()),
    "of another dtype": lambda tensor: tensor.astype(np.float64),
    "not finite": lambda tensor: np.where(
        np.arange(tensor.size).reshape(tensor.shape) == 3, np.array(np.nan, tensor.dtype), tensor
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("int8", "offset"),
        ("int8", "scale"),
        *(("pq12", tensor) for tensor in ("offset", "forward", "inverse", "centroids")),
    ],
)
def test_a_damaged_codebook_tensor_is_refused_by_name(name, tensor, damage, codecs):
    tensors = dict(codecs[name].tensors())
    changed = DAMAGE[damage](tensors.pop(tensor))
    if changed is not None:
        tensors[tensor] = changed
    with pytest.raises(InputError, match=rf"codebooks\.safetensors: .*'{tensor}'") as caught:
        load_codec(name, C, tensors)
    assert "\n" not in str(caught.value)


def test_codebooks_of_another_codec_are_refused(codecs):
    for name, others in itertools.permutations(("int8", "pq12", "pq13"), 2):
        if name != "int8":
            with pytest.raises(InputError, match=r"codebooks\.safetensors: "):
                load_codec(name, C, codecs[others].tensors())
    with pytest.raises(InputError, match=r"codebooks\.safetensors"):
        load_codec("pq12", C - 1, codecs["pq12"].tensors())
    tensors = dict(codecs["int8"].tensors(), scale=np.zeros(C, np.float32))
    with pytest.raises(InputError, match="'scale'"):
        load_codec("int8", C, tensors)


def test_an_images_decoded_tokens_have_its_own_mean(tokens_of_images):
    """Whatever the codes lose. The same mean is added to the tokens of a view."""
    tokens = tokens_of_images
    means = tokens.mean((1, 2), keepdim=True).expand_as(tokens)
    codec = learn_from("pq4", tokens.flatten(0, 2), means.flatten(0, 2), seed=0)
    codes, means = (torch.from_numpy(array) for array in codec.encode_grids(tokens))
    assert (codes.shape, means.shape, means.dtype) == ((40, 6, 6, 4), (40, 12), torch.float16)
    decoded = codec.decode_grids(codes, means)
    torch.testing.assert_close(decoded.mean((1, 2)), tokens.mean((1, 2)), atol=4e-3, rtol=1e-3)
    assert not torch.allclose(decoded, tokens, atol=0.1)
    view = codec.decode_grids(codes[:, 1:4, 2:5].flatten(1, 2), means)
    torch.testing.assert_close(view, decoded[:, 1:4, 2:5].flatten(1, 2))


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8", "pq12"])
def test_tokens_that_are_read_are_the_decoded_ones_and_only_fp16s_stay_float16(name, codecs):
    codes, means = map(torch.from_numpy, codecs[name].encode_grids(correlated(40, seed=9).reshape(10, 2, 2, C)))
    tokens, decoded = codecs[name].read_grids(codes, means), codecs[name].decode_grids(codes, means)
    assert (tokens.dtype, decoded.dtype) == (torch.float16 if name == "fp16" else torch.float32, torch.float32)
    assert torch.equal(tokens.float(), decoded)
    with pytest.raises(ValueError, match=name):
        codecs[name].read_grids(codes[..., 1:], means)


@pytest.mark.parametrize("name", ["pq12", "pq13"])
def test_large_blocks_of_tokens_as_on_an_accelerator_give_the_same_codes(name, codecs):
    tokens, quantiser = correlated(500, seed=8), codecs[name].quantiser
    codes = quantiser.encode_in_blocks(tokens, 400)
    assert (codes == quantiser.encode(tokens)).float().mean() > 0.999  # a near-tie may be decided otherwise
    decoded = codecs[name].decode(codes).reshape(5, 100, C).mean(1)
    torch.testing.assert_close(quantiser.mean_by_product(codes.reshape(5, 10, 10, -1)), decoded, atol=5e-3, rtol=1e-3)


def test_what_cannot_be_encoded_is_told_from_the_largest_magnitude(codecs):
    tokens = torch.tensor([[1.0, -65519.0], [3.0, 2.0]])
    assert float(peak_of(tokens)) == 65519
    assert float(peak_of(torch.empty(0, 2))) == 0
    assert torch.isfinite(tokens.half()).all()
    codecs["fp16"].check_peak(65519.0)
    for name, peak in (
        ("fp16", 65520.0),
        ("fp16", float(peak_of(torch.tensor([1.0, float("nan")])))),
        ("fp32", np.inf),
    ):
        with pytest.raises(InputError, match="the teacher's features"):
            codecs[name].check_peak(peak)
    codecs["pq12"].check_peak(1e6)
    with pytest.raises(InputError, match="fp16"):
        codecs["pq12"].check_means(torch.tensor([[np.inf]], dtype=torch.float16))


def test_a_codec_that_stores_no_means_encodes_grids_as_they_are(tokens_of_images):
    codec = load_codec("fp32", 12, {})
    codes, means = (torch.from_numpy(array) for array in codec.encode_grids(tokens_of_images))
    assert means.shape == (40, 0)
    assert torch.equal(codec.decode_grids(codes, means), tokens_of_images)


@pytest.fixture(scope="module")
def tokens_of_images():
    """40 images of 6 x 6 tokens of 12 channels, each image with a mean of its own."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 6, 6, 12, generator=generator) + 3 * torch.randn(40, 1, 1, 12, generator=generator)
