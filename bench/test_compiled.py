"""What kernels become: a row of the compile worker as a cell, and spills that are not hidden."""

from bench import compiled

ROW = {
    "kernel": "gradient_kernel", "constants": {"PRODUCT": "True"}, "registers": 235,
    "shared": 147456, "spills": 0, "stack": 0, "local": 0, "wgmma": 4, "mma": 0, "tcgen05": 0,
}  # fmt: skip


def test_a_row_of_the_worker_becomes_a_cell():
    found = compiled._of_triton(ROW, "sm_90", "3.9.0")
    assert compiled.cell(found) == "235, 144, 4 wgmma"
    other = {**ROW, "constants": {"PRODUCT": "False"}, "wgmma": 0, "spills": 2, "stack": 8}
    spilled = compiled._of_triton(other, "sm_80", "3.9.0")
    assert spilled["kernel"] == "gradient, no product"
    assert compiled.cell(spilled) == "235, 144, 10 spilled"
    text = compiled.table({"rows": [found, spilled]})
    assert "| `gradient` | 235, 144, 4 wgmma |  |" in text
    assert text.endswith("1 of 2 spill.")
    assert compiled.table({"rows": [found]}).endswith("None spills.")
