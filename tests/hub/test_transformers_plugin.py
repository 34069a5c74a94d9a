"""``from_pretrained(..., subfolder="sparse")`` of transformers, with this package imported and without it."""

from pathlib import Path

TESTS = Path(__file__).parent

SAVE = f"""
import sys
import torch
sys.path.insert(0, {str(TESTS)!r})
from tiny_models import tiny_bert, tiny_resnet
import sparse_ft

torch.set_num_threads(1)
torch.manual_seed(0)
bert, resnet = tiny_bert(), tiny_resnet(channels=(16, 16, 16, 16))
sparse_ft.convert(bert, policy="always")
with torch.no_grad():
    bert.bert.encoder.layer[0].intermediate.dense.weight[:3] = 0.0  # trained, and zero at present
sparse_ft.save_pretrained(bert, "bert", label_names=["no", "maybe", "yes"])
sparse_ft.save_pretrained(resnet, "resnet", label_names=[f"class {{i}}" for i in range(10)])
mask = bert.bert.encoder.layer[0].intermediate.dense.mask()
torch.save([bert.state_dict(), resnet.state_dict(), mask], "expected.pt")
"""

LOAD = """
import sparse_ft
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForSequenceClassification
import torch
torch.set_num_threads(1)
import sparse_ft.conversion
measured = sparse_ft.conversion.convert
report = []
def convert(model, masks):  # what is timed differs from run to run
    report.append(measured(model, policy="always", masks=masks))
sparse_ft.conversion.convert = convert

bert_weights, resnet_weights, mask = torch.load("expected.pt")
bert = AutoModelForSequenceClassification.from_pretrained("bert", subfolder="sparse")
encoder = AutoModel.from_pretrained("bert", subfolder="sparse")
resnet = AutoModelForImageClassification.from_pretrained("resnet", subfolder="sparse")
half = AutoModelForSequenceClassification.from_pretrained("bert", subfolder="sparse", dtype=torch.bfloat16)

def same(model, weights):
    found = model.state_dict()
    return found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)

print(same(bert, bert_weights), same(resnet.timm_model, resnet_weights))
print(same(encoder, {name.removeprefix("bert."): w for name, w in bert_weights.items() if name.startswith("bert.")}))
print(same(half, {name: w.bfloat16() for name, w in bert_weights.items()}))
print([len(each.converted) for each in report])
print(torch.equal(bert.bert.encoder.layer[0].intermediate.dense.mask(), mask))
print(bert.config.id2label[2], resnet.config.id2label[9])
print(hasattr(bert, "hf_quantizer"), hasattr(bert.config, "quantization_config"))
bert.save_pretrained("again")
again = AutoModelForSequenceClassification.from_pretrained("again")
print(same(again, bert_weights))
"""

STOCK = """
import sys
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification
for cls, name in (AutoModelForSequenceClassification, "bert"), (AutoModelForImageClassification, "resnet"):
    cls.from_pretrained(name)
    try:
        cls.from_pretrained(name, subfolder="sparse")
        print("loaded")
    except RuntimeError as error:
        print("ignore_mismatched_sizes" in str(error))
print("sparse_ft" in sys.modules)
import sparse_ft
print(type(AutoModelForSequenceClassification.from_pretrained("bert", subfolder="sparse")).__name__)
"""


def test_sparse_folder_opens_in_transformers_with_this_package_alone(run_client):
    """Without it the root opens, and the sparse folder is refused: never random weights in silence."""
    run_client(SAVE)
    lines = run_client(LOAD).splitlines()
    assert lines == [
        "True True",
        "True",
        "True",
        "[12, 12, 9, 12]",
        "True",
        "yes class 9",
        "False False",
        "True",
    ]
    assert run_client(STOCK).splitlines() == ["True", "True", "False", "BertForSequenceClassification"]


def test_importing_this_package_imports_neither_torch_nor_transformers(run_client):
    code = """
    import sys
    import sparse_ft
    print([name for name in ("torch", "transformers") if name in sys.modules])
    """
    assert run_client(code) == "[]\n"
