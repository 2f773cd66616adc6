"""Reward models: Bradley-Terry training and scoring."""
