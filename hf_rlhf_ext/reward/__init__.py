"""Reward models: training with the Bradley-Terry loss, scoring, ensembles and export."""
