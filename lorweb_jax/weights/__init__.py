"""Weights in files: conversion tables, safetensors, pretrained folders, the basis and LoRA formats."""
