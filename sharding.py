"""One model spread over the processes of a run, for what does not fit on one device (--shard).

PyTorch's FSDP2 (fully_shard), after ZeRO (Rajbhandari et al. 2020): each process keeps an equal part of each weight, of
its gradient and of what the optimizer remembers of it. Before a layer computes, all send it their parts; behind it they
are let go, and each gradient is averaged right into the part of the process that keeps it.

Such a weight is a DTensor: a tensor of the whole's shape, of which to_local() is the part that this process has, cut
along the first dimension. torch.distributed.checkpoint writes each part from where it is, and reads them back for any
number of processes.
"""

import hashlib
import os
import pickle
import shutil
import warnings

import torch
import torch.distributed as dist

from utils import UserError

# ---------------------------------------------------------------------------------------------------------------------
# The model


def check_shard(options, given, device, dtype, processes):
    """Raises UserError where --shard cannot work, or would do nothing. A resumed run may go on in one process."""
    if not options.shard:
        return
    if processes == 1 and "shard" in given and not options.resume:
        raise UserError("--shard: spreads a model over several processes; start them with torchrun, or leave it out")
    try:
        from torch.distributed.fsdp import FSDPModule
    except ImportError:
        raise UserError(f"--shard: needs PyTorch 2.6 or newer, not {torch.__version__}; leave it out") from None
    if device.type == "cpu" and not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise UserError(f"--shard: on a CPU needs PyTorch 2.8 or newer, not {torch.__version__}; leave it out")
    if dtype == torch.float16:  # each process would find other numbers too large for it, and scale otherwise
        raise UserError("--shard: needs --dtype bfloat16 or float32, not float16")


def shard(model, device, dtype, processes):
    """Spread the weights of a model over the processes, layer by layer, and have it compute in `dtype`."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = DeviceMesh.from_group(processes.group, device.type)
    how = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    layers = model.transformer.h if hasattr(model, "transformer") else model.layers
    for part in (*layers, model):  # the model's own are the embeddings, the last norm and the head
        fully_shard(part, **how)
        if device.type == "cpu":  # a sum, and then divided: PyTorch 2.7 and 2.8 took a mean for a sum (issue 162338)
            part.set_force_sum_reduction_for_comms(True)


def is_sharded(model):
    return hasattr(model, "set_requires_gradient_sync")


def own(tensor):
    """The part of a sharded tensor that this process keeps; another tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor):
    """All of a sharded tensor, which every process must ask for; another tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def by_whole_matrices(function, rows, weight):
    """function of matrices (N, rows, columns), of which a process may have but the rows that it keeps of `weight`."""
    if not hasattr(weight, "to_local"):
        return function(rows)
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh, shape = weight.device_mesh, torch.Size((len(rows), *weight.shape))
    stride = (weight.numel(), weight.size(1), 1)
    matrices = DTensor.from_local(rows, mesh, [Shard(1)], run_check=False, shape=shape, stride=stride).full_tensor()
    result = DTensor.from_local(function(matrices), mesh, [Replicate()], run_check=False)
    return result.redistribute(placements=[Shard(1)]).to_local()


def whole_weights(model, processes):
    """The whole weights of a sharded model by name, in the CPU's memory of process 0; {} for the others."""
    weights = {}
    for name, p in model.state_dict().items():
        full = whole(p)
        if processes.first:
            weights[name] = full.cpu()
    return weights


# ---------------------------------------------------------------------------------------------------------------------
# Its state


def learned(learner):
    """All sharded tensors that a Learner has, by name: the weights, and what the optimizers remember of each."""
    tensors = {f"model.{name}": p.detach() for name, p in learner.model.named_parameters()}
    for n, optimizer in enumerate(learner.optimizers):
        for i, memory in optimizer.state_dict()["state"].items():
            tensors.update({f"optimizers.{n}.{i}.{key}": tensor for key, tensor in memory.items()})
    return tensors


def copies(tensors, processes):
    """Copies in the CPU's memory of what `learned` gave, which training goes on to change."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    mesh = DeviceMesh.from_group(processes.saving, "cpu")

    def copied(tensor):
        part = own(tensor).detach().to("cpu", copy=True)
        if not hasattr(tensor, "placements"):
            return part
        shape = dict(shape=tensor.shape, stride=tensor.stride())
        return DTensor.from_local(part, mesh, tensor.placements, run_check=False, **shape)

    return {name: copied(tensor) for name, tensor in tensors.items()}


def write_tensors(directory, tensors, processes):
    """Write what `copies` gave into a new directory, all processes at the same time.

    Returns the SHA-256 of each file by its name, in process 0; None in the others. Raises OSError in all of them where
    one cannot write.
    """
    from torch.distributed.checkpoint import CheckpointException, FileSystemWriter, save

    group = processes.saving
    if processes.first:
        shutil.rmtree(directory, ignore_errors=True)  # a crash may have left it
    dist.barrier(group)
    try:
        save(tensors, storage_writer=FileSystemWriter(directory), process_group=group)
    except CheckpointException as error:
        raise first_cause(error) from None
    files = [name for name in os.listdir(directory) if name.startswith(f"__{processes.rank}_")]
    sums = {name: file_sum(os.path.join(directory, name)) for name in files}
    all_sums = [None] * processes.world if processes.first else None
    dist.gather_object(sums, all_sums, group=group)
    if not processes.first:
        return None
    all_sums.append({METADATA: file_sum(os.path.join(directory, METADATA))})
    return {name: sha256 for sums in all_sums for name, sha256 in sums.items()}


def first_cause(error):
    """The OSError behind what torch.distributed.checkpoint raises."""
    causes = [cause for cause, _ in error.failures.values()]
    found = next((cause for cause in causes if isinstance(cause, OSError)), None)
    return found or OSError(None, str(causes[0]).strip().splitlines()[-1])  # PyTorch's writer hides the system's error


def file_sum(path):
    """The SHA-256 of a file."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as f:
        for piece in iter(lambda: f.read(2**20), b""):
            sha256.update(piece)
    return sha256.hexdigest()


METADATA = ".metadata"  # torch.distributed.checkpoint's name for the file that says where each number lies


def read_tensors(directory, model, weights):
    """Read what write_tensors wrote, for a model that is sharded over these processes or not at all.

    weights: those of each optimizer, in its order. The model's are read in place; returns what each optimizer
    remembers: [{number of the weight: {name: tensor}}].
    """
    from torch.distributed.checkpoint import load

    reader, tensors, named = safe_reader(directory), {}, dict(model.named_parameters())
    for name, kept in reader.read_metadata().state_dict_metadata.items():
        kind, rest = name.split(".", 1)
        if kind == "model":
            tensors[name] = named[rest].detach()
        else:
            n, i, _ = rest.split(".")
            weight = weights[int(n)][int(i)].detach()
            alike = kept.size == weight.shape  # all but the number of steps
            tensors[name] = torch.empty_like(weight) if alike else torch.empty(kept.size, dtype=kept.properties.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is but one process
        load(tensors, storage_reader=reader, no_dist=not is_sharded(model))
    memories = [{} for _ in weights]
    for name, tensor in tensors.items():
        if name.startswith("optimizers."):
            _, n, i, key = name.split(".")
            memories[int(n)].setdefault(int(i), {})[key] = tensor
    return memories


def spread(tensors, weights):
    """Whole tensors by name, each as the weight of that name is spread; those of another shape as they are."""
    from torch.distributed.tensor import distribute_tensor

    def as_weight(tensor, weight):
        if weight is None or tensor.shape != weight.shape:
            return tensor
        return distribute_tensor(tensor.to(own(weight).device), weight.device_mesh, weight.placements)

    return {name: as_weight(tensor, weights.get(name)) for name, tensor in tensors.items()}


def safe_reader(directory):
    """A reader of torch.distributed.checkpoint that never runs a pickle's code: the table of contents is a pickle."""
    from torch.distributed.checkpoint import FileSystemReader

    class SafeReader(FileSystemReader):
        def read_metadata(self, *args, **kwargs):
            path = os.path.join(directory, METADATA)
            with open(path, "rb") as f:
                try:
                    return _Contents(f).load()
                except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, TypeError) as error:
                    raise UserError(f"{path}: is damaged ({error})") from None

    return SafeReader(directory)


class _Contents(pickle.Unpickler):
    """Unpickles the plain classes of which a table of contents consists, and refuses every other name.

    By name, each of them: pickle follows dots, and a module has what it imports itself ("os.system").
    """

    PLAIN = {  # noqa: RUF012
        ("torch.distributed.checkpoint.metadata", "Metadata"),
        ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
        ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "TensorProperties"),
        ("torch.distributed.checkpoint.metadata", "StorageMeta"),
        ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib", "WindowsPath"),
    }

    def find_class(self, module, name):
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in self.PLAIN or dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")
