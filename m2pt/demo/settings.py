"""What is run, and with which hyperparameters."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingSettings:
    """AdamW with a cosine schedule and a tenth of the steps for warm-up.

    Weight decay is for matrices: vectors and cross-modal scales have none. The scales' learning rate is ten times as
    high by default: AdamW's steps are about as long as the learning rate, and a scale has a range of order 1 to cover.
    It was raised once: at 1e-3 scales stayed near 0.01, and the pathway's accuracy was the baseline's as well.
    """

    epochs: int
    batch_size: int
    learning_rate: float = 1e-3
    scale_learning_rate: float = 1e-2
    weight_decay: float = 0.05


@dataclass(frozen=True)
class Settings:
    """The experiment. Learning rate, batch size and epochs were chosen by the baseline's accuracy on those training
    utterances that it had no labels of, with seeds that the experiment does not use.

    aux_dtype is how the auxiliary weights are stored, as `m2pt.quantize_aux` takes it; None leaves them as they are.
    """

    seeds: int = 5
    labelled_per_speaker: int = 4
    mask_ratio: float = 0.5
    speech_pretraining: TrainingSettings = TrainingSettings(epochs=80, batch_size=45)
    digit_pretraining: TrainingSettings = TrainingSettings(epochs=12, batch_size=64)
    fine_tuning: TrainingSettings = TrainingSettings(epochs=30, batch_size=12)
    aux_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise ValueError(f"seeds: expected at least 2, for a standard deviation, got {self.seeds}")
