"""Materials: attention, blocks, convolutions and positions that every model of the house is built from.

In: tensors. Out: tensors. Never knows what the tensors mean: no codes, no token ids, no configs of other rooms.
"""
