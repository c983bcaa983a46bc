import numpy as np
import pytest

from fastmae.config import FeaturesConfig
from fastmae.errors import InputError
from fastmae.evaluate.feature_files import SafetensorsFeatures


@pytest.mark.parametrize("rows", [1, 9, 10, 101])  # the header's numbers have one to three digits
def test_a_safetensors_file_grows_row_by_row_to_any_number_of_rows(rows, read_features, tmp_path):
    vectors = np.random.default_rng(0).normal(size=(rows, 5)).astype(np.float32)
    grids = np.random.default_rng(1).normal(size=(rows, 2, 2, 5)).astype(np.float32)
    file = SafetensorsFeatures(tmp_path / "a", 1000, 5, 2, "fp32", {})
    for row in range(rows):
        file.add([f"{row}"], vectors[row : row + 1], grids[row : row + 1])
    file.close()
    features = read_features(tmp_path / "a")
    np.testing.assert_array_equal(features["embeddings"], vectors)
    np.testing.assert_array_equal(features["dense"], grids)
    assert features["paths"] == [str(row) for row in range(rows)]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("name", "dense", "named"),
    [("out.csv", False, ".parquet"), ("out.parquet", True, "--dense"), ("folder.parquet", False, "folder.parquet")],
)
def test_a_file_that_cannot_hold_the_features_is_named(name, dense, named, tmp_path):
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(InputError, match=named):
        FeaturesConfig(run="run", images=tmp_path, out=tmp_path / name, dense=dense).check_out()
