"""Tile sizes of the GPU kernel, shared by its planning (`gpu.py`) and body (`gpu_attend.py`)."""

# Query rows of one matrix product, by matrix unit: Hopper's wgmma, Blackwell's tcgen05.
QUERY_ROWS_OF_UNIT = {"wgmma": 64, "tcgen05": 128}
BLOCK_TOKENS = 64  # keys in a stage of the ring
