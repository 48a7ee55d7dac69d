"""Several processes as one run: who they are, what they tell each other, and how they all end together.

    torchrun --nproc_per_node 8 train.py ...                                  # one machine with 8 GPUs
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py ...    # on each of 2

torchrun starts the processes and tells each of them its place by environment variables. Each learns from its own share
of every batch, and they average their gradients (optim.Learner), so that all have the same weights after each step.
Process 0 speaks, decides and writes the files; the others do as it says. Without torchrun there is one process, and
all that is here does nothing.
"""

import contextlib
import datetime
import os
import re
import signal
import socket
import sys
import threading
import time
import uuid
import warnings

import torch
import torch.distributed as dist

from utils import UserError, environment_number, first_line, pick_device, refuse

TOLD = "error"  # the key in the store that they share under which a process says that it ends with an error
LISTEN_SECONDS = 0.5  # how often the others look there
PATIENCE = datetime.timedelta(minutes=30)  # for a process that is slow; one that has ended is noticed at once
GO_ON = "go on with --resume, or with --fresh where nothing was saved yet"
MEETING = datetime.timedelta(minutes=5)  # for all of them to be there, which torchrun starts at the same time


class Processes:
    """The processes of a run as one of them sees them; made without arguments, a process alone.

    rank: its number, from 0. world: how many there are. local_rank: its number on its machine.
    """

    def __init__(self, rank=0, world=1, local_rank=0, store=None):
        self.rank, self.world, self.local_rank, self.store = rank, world, local_rank, store
        self.group = None  # those that average gradients, by NCCL between GPUs; what else they say goes by gloo
        self.saving = None  # the same ones for a thread that writes beside the training: what it says does not mix
        self.left, self.listener = threading.Event(), threading.Thread(target=self.listen, daemon=True)

    @property
    def first(self):
        return self.rank == 0

    # -- at the start

    def own_device(self, name):
        """The torch.device of this process: of several GPUs, each process of a machine has its own."""
        device = pick_device(name)
        if self.world == 1:
            return device
        if device.type == "mps":
            raise UserError(f"--device {name or 'mps'}: several processes cannot share it; add --device cpu")
        if device.type == "cuda":
            count = torch.cuda.device_count()
            if device.index is not None:
                raise UserError(f"--device {name}: each process has a GPU of its own; say --device cuda")
            if self.local_rank >= count:
                raise UserError(
                    f"--device cuda: this machine has {count} GPU(s), too few for {self.local_rank + 1} processes; "
                    f"lower torchrun's --nproc_per_node, or add --device cpu"
                )
            device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(device)
        return device

    def begin(self, device):
        """Get ready to average gradients on this device."""
        if self.world > 1:
            self.group = dist.new_group(backend="nccl") if device.type == "cuda" else dist.group.WORLD
            self.saving = dist.new_group(backend="gloo")

    # -- what they tell each other; all of them must ask at the same point of the run

    def from_first(self, function):
        """What function() returns in process 0, for all."""
        if self.world == 1:
            return function()
        box = [function() if self.first else None]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gather(self, thing):
        """The things of all processes in process 0, as a list; None in the others."""
        if self.world == 1:
            return [thing]
        things = [None] * self.world if self.first else None
        dist.gather_object(thing, things)
        return things

    def agree(self, *figures, signal=0):
        """[signal, *figures]: the highest signal that any process has, and the figures of process 0."""
        if self.world == 1:
            return [signal, *figures]
        ours = [signal, *(float(figure) if self.first else -float("inf") for figure in figures)]
        theirs = torch.tensor(ours, dtype=torch.float64)
        dist.all_reduce(theirs, dist.ReduceOp.MAX)
        return [int(theirs[0]), *theirs[1:].tolist()]

    def sum(self, figure):
        """The sum of a number over all processes."""
        if self.world == 1:
            return figure
        total = torch.tensor(figure, dtype=torch.float64)
        dist.all_reduce(total)
        return float(total)

    def average(self, tensors):
        """Replace each of these float32 tensors by its mean over the processes, all in one message."""
        if self.world > 1:
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            dist.all_reduce(flat, group=self.group)
            parts = flat.div_(self.world).split([tensor.numel() for tensor in tensors])
            for tensor, mean in zip(tensors, parts):
                tensor.copy_(mean.view_as(tensor))

    # -- the end

    def listen(self):
        """Until this process leaves: end it as soon as another one tells of an error, or torchrun has gone.

        In a thread of its own, as the process itself may be waiting for the one that has failed.
        """
        while not self.left.wait(LISTEN_SECONDS):
            try:
                told, gone = self.store.check([TOLD]), False
            except RuntimeError:
                told = gone = True  # the store, and torchrun with it
            if told and not self.left.is_set():
                if self.first:
                    print(file=sys.stderr)  # the end of the progress bar's line
                if self.first and gone:
                    refuse(f"torchrun has ended; {GO_ON}")
                end_after_the_speaker()

    def stop_listening(self):
        """Listen no more; a thread that still asked the store while Python ends would end it with an abort."""
        self.left.set()
        if self.listener.is_alive():
            self.listener.join()

    def ignore_torchrun(self):
        """Once there is an error: torchrun, which sees a process end, sends SIGTERM to the others. They end by
        themselves, but not before one has told why."""
        if self.world > 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def speaks(self):
        """Is it this process that tells of the error which it has? One does, the others end quietly.

        Most errors are those of all processes: so all but process 0 wait a second for it to speak.
        """
        self.ignore_torchrun()
        try:
            for _ in range(10):
                if self.first or self.store.check([TOLD]):
                    break
                time.sleep(0.1)
            self.stop_listening()
            if self.store.add(TOLD, 1) != 1:
                return False
        except RuntimeError:
            return False
        if not self.first:
            time.sleep(1.2 * LISTEN_SECONDS)  # until process 0 has closed its progress bar
        return True

    def leave(self):
        """Wait for the others, then leave: until then none ends, which torchrun would take for the end of them all."""
        if self.world > 1:
            self.agree()
            self.stop_listening()
            dist.destroy_process_group()


ALONE = Processes()


@contextlib.contextmanager
def job():
    """The Processes that torchrun started, or the one process there is. An error in one of them ends them all."""
    processes = ALONE
    try:
        world = environment_number("WORLD_SIZE", 1, at_least=1)
        if world > 1 and "RANK" in os.environ:
            check_environment(world)
            if not hasattr(dist.Store, "check"):
                raise UserError(f"torchrun: several processes need PyTorch 2.3 or newer, not {torch.__version__}")
            processes = join()
        yield processes
        processes.leave()
    except Exception as error:
        if processes.world == 1:
            raise
        if not processes.speaks():
            end_after_the_speaker()
        if is_loss(error):
            reason = first_line(error)
            reason = re.sub(r"^\[[^]]*\] ", "", reason)[:100]  # gloo begins with its own place
            raise UserError(
                f"another process of this run has ended, or cannot be reached ({reason}); {GO_ON}"
            ) from None
        if isinstance(error, UserError) and not processes.first:
            raise UserError(f"process {processes.rank} on {socket.gethostname()}: {error}") from None
        raise


def launcher(world):
    """What starts so many processes again, as it is typed before the name of the program."""
    if world == 1:
        return "python"
    on_this_machine = environment_number("LOCAL_WORLD_SIZE", 0) == world
    return f"torchrun --standalone --nproc_per_node {world}" if on_this_machine else "torchrun ..."


def check_environment(world):
    """Raises UserError where the environment is not one that torchrun makes for one of several processes."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(f"WORLD_SIZE and RANK are set, {name} is not: start several processes with torchrun")
    rank = environment_number("RANK", 0)
    if rank >= world:
        raise UserError(f"RANK={rank}: is too high for WORLD_SIZE={world}, it counts from 0; start with torchrun")
    environment_number("LOCAL_RANK", rank)
    environment_number("MASTER_PORT", None)


def end_after_the_speaker():
    """End quietly, but not before the process that tells of its error: at the first end torchrun stops all others."""
    sys.stdout.flush()
    time.sleep(3)
    os._exit(2)


def join():
    """The Processes of torchrun's job, once all of them are there."""
    warnings.filterwarnings("ignore", module="torch.distributed")
    store, rank, world = next(dist.rendezvous("env://", timeout=MEETING))
    name = meet(store, rank, world)
    store.set_timeout(PATIENCE)
    store = dist.PrefixStore(name, store)
    processes = Processes(rank, world, environment_number("LOCAL_RANK", rank), store)
    if not processes.first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    processes.listener.start()
    name_interface(os.environ["MASTER_ADDR"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=PATIENCE)
    return processes


def meet(store, rank, world):
    """A name for this start of the processes, which all of them get from process 0.

    torchrun's store still holds what the processes wrote that it has started again: each start keeps to its own part.
    """
    if rank > 0:
        ours = uuid.uuid4().hex
        store.set(f"nanogpt/{rank}", ours)
        name = store.get(f"nanogpt/to/{ours}").decode()  # waits for it
        store.set(f"nanogpt/{name}/{rank}", "here")
        return name
    name, missing = uuid.uuid4().hex, set(range(1, world))
    while missing:
        for other in list(missing):
            if store.check([f"nanogpt/{other}"]):  # it may be that of an earlier start, which another one will replace
                store.set(f"nanogpt/to/{store.get(f'nanogpt/{other}').decode()}", name)
            if store.check([f"nanogpt/{name}/{other}"]):
                missing.discard(other)
        time.sleep(0.02)
    return name


def name_interface(host):
    """Tell gloo which network interface reaches that host, unless the user did.

    Left alone it takes the address of the machine's own name, on many systems 127.0.1.1, where no other machine is.
    """
    if os.name == "nt" or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    import fcntl

    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 1))  # sends nothing; it only looks the way up
        address = probe.getsockname()[0]
        if address.startswith("127.") and os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
            return  # this is the host itself, by a name that means something else on the others
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                found = fcntl.ioctl(probe.fileno(), 0x8915, name.encode().ljust(256, b"\0"))  # SIOCGIFADDR
                if socket.inet_ntoa(found[20:24]) == address:
                    os.environ["GLOO_SOCKET_IFNAME"] = name
                    return


def is_loss(error):
    """Is the error about another process that cannot be reached, rather than about this one?"""
    kinds = tuple(getattr(dist, name) for name in ("DistBackendError", "DistNetworkError") if hasattr(dist, name))
    words = ("gloo", "Connection closed by peer", "Connection reset", "NCCL")
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))
