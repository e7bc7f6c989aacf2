"""A large file of weights → a network, strictly: memory-mapped, converted piece by piece.

A tensor in the network's own dtype and layout is not copied: its pages are read when it is first
used. Converted, the peak is the new weights and GROUP_BYTES of the file, whatever its size.
A file must not be written to in place while a network uses it; replacing it by renaming is safe.
"""

import torch

from pixcell_min.checkpoint import load_strict, read_tensors

GROUP_BYTES = 2**27  # of the file, mapped at a time while it is converted


def build_on_meta(make, source):
    """`make()` on the meta device: no random start is computed for weights that are overwritten.

    Raises: ValueError naming `source`, the configuration, if it makes no network or one too large.
    """
    try:
        with torch.device("meta"):
            return make()
    except (ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{source}: makes no network: {error}") from None


def load_weights(module, path, leave=()) -> None:
    """Give `module`, built on the meta device, a file's tensors, each in its place's dtype, layout.

    leave: names of layers that take the file's dtype: mapped, they cost no memory until they are
    used. Raises: ValueError as `read_tensors` and `load_strict` say.
    """
    tensors, _ = read_tensors(path)
    for name in leave:
        weight = tensors.get(f"{name}.weight")
        if weight is not None and weight.is_floating_point():  # else load_strict refuses the file
            module.get_submodule(name).to(weight.dtype)
    places = module.state_dict()
    others = [name for name, tensor in tensors.items() if name in places
              and tensor.is_floating_point() and _differs(tensor, places[name])]
    for group in groups(others, [tensors[name].nbytes for name in others], GROUP_BYTES):
        mapped, _ = read_tensors(path)  # anew: what was read counts as used until it is unmapped
        for name in group:
            place = places[name]
            new = torch.empty_strided(place.shape, place.stride(), dtype=place.dtype)
            tensors[name] = new.copy_(mapped[name])
        del mapped
    load_strict(module, tensors, path)


def move(module, device, leave=()) -> None:
    """Put `module` on a device, all but the layers named in `leave`: they stay where they are."""
    for name, part in module.named_modules():
        if name not in leave:
            part._apply(lambda tensor: tensor.to(device), recurse=False)


def _differs(tensor, place):
    """Whether they are of one shape, yet of other dtypes or memory orders."""
    strides = [(a, b) for size, a, b in zip(tensor.shape, tensor.stride(), place.stride())
               if size > 1]
    return tensor.shape == place.shape and (
        tensor.dtype != place.dtype or any(a != b for a, b in strides))


def groups(names, sizes, limit):
    """Names in order, in lists whose sizes add up to `limit` at most, or of one name."""
    found, total = [], 0
    for name, size in zip(names, sizes, strict=True):
        if not found or total + size > limit:
            found.append([])
            total = 0
        found[-1].append(name)
        total += size
    return found
