"""Training an autoencoder on rows of hidden states."""

from bae_fast.training.bank import CodeBank
from bae_fast.training.binary import PRESETS, BinaryObjective, TrainingConfig
from bae_fast.training.config import LoopConfig
from bae_fast.training.feature_shards import gather_features, shard_features
from bae_fast.training.graph import CapturedStep, CudaGraphs, Graphs
from bae_fast.training.jobs import Job, JobTrainer, RunConfig, StoppedError
from bae_fast.training.learner import Learner
from bae_fast.training.live import LiveSupply
from bae_fast.training.objective import Loss, Objective, Step
from bae_fast.training.pool import Pool, Poolable
from bae_fast.training.recipe import fit_search_, init_from_rows_, refit_decoder_, revive_
from bae_fast.training.shards import ShardSupply
from bae_fast.training.sparse import SparseConfig, SparseObjective, Trainable
from bae_fast.training.supply import MemorySupply, Rows, Supply, merge_states
from bae_fast.training.trainer import Trainer

__all__ = [
    "PRESETS",
    "BinaryObjective",
    "CapturedStep",
    "CodeBank",
    "CudaGraphs",
    "Graphs",
    "Job",
    "JobTrainer",
    "Learner",
    "LiveSupply",
    "LoopConfig",
    "Loss",
    "MemorySupply",
    "Objective",
    "Pool",
    "Poolable",
    "Rows",
    "RunConfig",
    "ShardSupply",
    "SparseConfig",
    "SparseObjective",
    "Step",
    "StoppedError",
    "Supply",
    "Trainable",
    "Trainer",
    "TrainingConfig",
    "fit_search_",
    "gather_features",
    "init_from_rows_",
    "merge_states",
    "refit_decoder_",
    "revive_",
    "shard_features",
]
