"""Real recipes of SparseML."""

import pytest

from sparse_ft.recipes import Recipe, RecipeError

# What is wrong with the recipes that cannot be read.
DOCUMENTED = {
    "mobilenet-pruned_quant.md": "undefined alias 'pruning_recovery_end_lr'",
    "pruning-mobilenet-imagenette-mfac-short-95.md": "unknown field; did you mean 'available_devices'?",
    "e2e_recipe.yaml": "no variable 'start_quant_epoch'",
    "tiny_llama_separate_quant.yaml": "the text under 'first_recipe' (line 5) looks like a recipe",
    "tiny_stories_conf1.yaml": "the text under 'recipe' (line 6) looks like a recipe",
    "tiny_stories_conf4.yaml": "the text under 'recipe' (line 7) looks like a recipe",
}


def recipes(folder):
    return sorted(path for path in (folder / "recipes").rglob("*") if path.is_file())


def test_every_recipe_reads_back_equal_or_says_what_is_wrong(compat_folder):
    paths = recipes(compat_folder)
    assert len(paths) == 54
    failed = {}
    for path in paths:
        short = path.name.rpartition("__")[2]
        try:
            recipe = Recipe.load(path)
        except RecipeError as error:
            failed[short] = error
            assert DOCUMENTED[short] in str(error)
            assert str(path) in str(error)
            assert "\n" not in str(error)
            continue
        again = Recipe.load(recipe.dump())
        assert again == recipe, path
        assert again.modifiers == recipe.modifiers
        assert again.dump() == recipe.dump()
        if any(stage.one_shot for stage in recipe.document.stages):
            with pytest.raises(RecipeError, match="one-shot stage 'sparsity_stage', which only mappings"):
                recipe.to_flat()
            continue
        flat = recipe.to_flat()
        assert flat.document.dialect == "flat"
        assert flat.modifiers == recipe.modifiers
        assert Recipe.load(flat.dump()).modifiers == recipe.modifiers
    assert failed.keys() == DOCUMENTED.keys()


def test_arguments_fill_the_gaps_of_a_recipe(compat_folder):
    (path,) = (compat_folder / "recipes" / "new").glob("*e2e_recipe.yaml")
    recipe = Recipe.load(path, args="start_quant_epoch=4,warm_up_epochs=1,pruning_epochs=2.5")
    pruning = recipe.modifiers[1]
    assert (pruning.start_epoch, pruning.end_epoch, pruning.update_frequency) == (1.0, 3.5, 0.5)
    assert Recipe.load(recipe.dump()) == recipe


def test_quantization_is_read_and_refused(compat_folder):
    (path,) = (compat_folder / "recipes" / "legacy").glob("*recipe_short_prune_quant.md")
    recipe = Recipe.load(path)
    with pytest.raises(RecipeError, match=r"line \d+: QuantizationModifier: quantization is not supported here"):
        recipe.check_supported()


def test_what_is_not_supported_can_be_passed_over(compat_folder, caplog):
    (path,) = (compat_folder / "recipes" / "legacy").glob("*recipe_short_prune_quant.md")
    recipe = Recipe.load(path, ignore_unknown=True)
    recipe.check_supported()
    assert "QuantizationModifier" in caplog.text
    assert "QuantizationModifier" in recipe.dump()
    assert [modifier.type_name for modifier in recipe.modifiers] == [
        "EpochRangeModifier",
        "SetWeightDecayModifier",
        "MagnitudePruningModifier",
        "SetLearningRateModifier",
        "LearningRateFunctionModifier",
    ]
