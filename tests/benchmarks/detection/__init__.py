"""The proving ground of the warnings: trainings that slingshot, trainings that do not, and the score."""
