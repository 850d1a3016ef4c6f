"""Plain networks as a user brings them, in the manner of torchvision: torch alone is needed."""

import torch
from torch import nn


class Basic(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet18(nn.Module):
    def __init__(self, widths=(8, 16, 24, 32), classes=4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs = widths[0]
        for number, outputs in enumerate(widths, start=1):
            stage = nn.Sequential(
                Basic(inputs, outputs, 1 if number == 1 else 2), Basic(outputs, outputs, 1)
            )
            setattr(self, f"layer{number}", stage)
            inputs = outputs
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Inverted(nn.Module):
    def __init__(self, inputs, outputs, stride, expansion):
        super().__init__()
        inner = inputs * expansion
        self.shortcut = stride == 1 and inputs == outputs
        layers = []
        if expansion != 1:
            layers += [nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()]
        layers += [
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(),
            nn.Conv2d(inner, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        self.conv = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.conv(x) if self.shortcut else self.conv(x)


def unit(inputs, outputs, kernel):
    conv = nn.Conv2d(inputs, outputs, kernel, 1, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())


class MobileNetV2(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        layers = [unit(3, 8, 3)]
        inputs = 8
        for expansion, outputs, count, stride in [
            (1, 8, 1, 1),
            (4, 12, 2, 2),
            (4, 16, 2, 2),
            (4, 24, 1, 1),
        ]:
            for k in range(count):
                layers.append(Inverted(inputs, outputs, stride if k == 0 else 1, expansion))
                inputs = outputs
        layers.append(unit(24, 48, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(48, classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean([2, 3]))


class Dense(nn.Module):
    """Every layer sees all before it: only the transition is on the main path."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, 1, 1)
        self.second = nn.Conv2d(4, 4, 3, 1, 1)
        self.third = nn.Conv2d(8, 4, 3, 1, 1)
        self.transition = nn.Conv2d(12, 6, 1)
        self.last = nn.Conv2d(6, 6, 3, 2, 1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        a = torch.relu(self.first(x))
        b = torch.relu(self.second(a))
        c = torch.relu(self.third(torch.cat([a, b], 1)))
        x = torch.relu(self.transition(torch.cat([a, b, c], 1)))
        return self.fc(torch.relu(self.last(x)).mean((2, 3)))


class Tuples(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = ResNet18()
        self.both = Both()

    def forward(self, x):
        return self.net(self.both(x)[0])


class Both(nn.Module):
    def forward(self, x):
        return x, x
