"""Everything that the page says, in English and in Chinese."""

from __future__ import annotations

ENGLISH = {
    "title": "# Ask about a picture",
    "placeholder": "Add a picture and ask about it",
    "ways": "Choose a file, drag or paste it, or take a photo. Or try one of these:",
    "conversation": "Conversation",
    "question": "Question",
    "write": "Ask about your pictures",
    "new": "New conversation",
    "camera": "Camera",
    "settings": "Settings",
    "about_settings": "How answers are generated. The defaults are the model's own.",
    "do_sample": "Sample: answers vary",
    "temperature": "Temperature",
    "about_temperature": "lower is more certain",
    "top_p": "Top p",
    "about_top_p": "the likeliest tokens that make up this share",
    "top_k": "Top k",
    "about_top_k": "the k likeliest tokens; 0: all",
    "repetition_penalty": "Repetition penalty",
    "about_repetition_penalty": "above 1 makes repeating less likely",
    "max_new_tokens": "Maximum answer length, in tokens",
    "trained_on": "trained on {data}",
    "samples": "{samples:,} samples",
    "steps": "{steps:,} steps",
    "picture": "picture",
    "reading": "Looking at the question …",
    "waiting": "Questions ahead of yours: {ahead}",
    "stopped": "Stopped.",
    "shortened": "The conversation is longer than the model can read: its oldest questions were left out.",
    "full": "All {most} places are taken. Please try again in a few minutes.",
    "busy": "Your last question is still being answered. Stop it, or wait until it finishes.",
    "too_fast": "At most {most} questions a minute. Please wait {seconds} seconds.",
    "too_long": "The question has {length:,} characters; at most {most:,} are accepted. Please shorten it.",
    "no_room": "The question and its pictures are longer than the {most:,} tokens the model can read. Please shorten "
    "it, or start a new conversation.",
    "too_many_pictures": "At most {most} pictures in a conversation. Please start a new one.",
    "too_many_turns": "This conversation has {most} questions. Please start a new one.",
    "bad_picture": "“{name}” can't be read: it is damaged, or not a picture. It was removed.",
    "gone_picture": "“{name}” is no longer there. Please add it again.",
    "large_picture": "“{name}” is too large: at most {megabytes:,g} MB and 100 megapixels are accepted. "
    "It was removed.",
    "large_upload": "The files are too large: at most {megabytes:,g} MB together are accepted.",
    "no_room_for_uploads": "There is no room for more pictures now. Please try again later.",
    "many_logins": "Too many wrong passwords. Please wait a minute.",
    "bad_setting": "{name} must be from {least:g} to {most:g}.",
    "nothing_asked": "Please write a question.",
    "ended": "This conversation has ended. Please start a new one.",
    "gone": "That question is no longer there. Please ask again.",
    "out_of_memory": "The model ran out of memory. Please ask with fewer pictures, or start a new conversation.",
    "failed": "The model could not answer. Please try again, or start a new conversation.",
    "example_colour": "What color is the shape?",
    "example_shape": "What is in the image?",
    "example_two": "What is in these two images?",
    "example_photo": "Which colors are in the image?",
}

CHINESE = {
    "title": "# 看图问答",
    "placeholder": "添加一张图片，然后提问",
    "ways": "上传、拖放、粘贴图片，或用摄像头拍摄；也可以试试下面的例子：",
    "conversation": "对话",
    "question": "问题",
    "write": "输入问题，可添加图片",
    "new": "新对话",
    "camera": "摄像头",
    "settings": "设置",
    "about_settings": "控制回答的生成方式；默认值为模型自带的设置。",
    "do_sample": "随机采样：每次回答可能不同",
    "temperature": "温度",
    "about_temperature": "越低越确定",
    "top_p": "Top p",
    "about_top_p": "只在概率之和达到此值的词元中采样",
    "top_k": "Top k",
    "about_top_k": "只在概率最高的 k 个词元中采样；0 表示全部",
    "repetition_penalty": "重复惩罚",
    "about_repetition_penalty": "大于 1 时减少重复",
    "max_new_tokens": "回答的最大长度（词元数）",
    "trained_on": "训练数据：{data}",
    "samples": "{samples:,} 个样本",
    "steps": "{steps:,} 步",
    "picture": "图片",
    "reading": "正在阅读问题……",
    "waiting": "排在您前面的问题：{ahead} 个",
    "stopped": "已停止。",
    "shortened": "对话超出了模型能读的长度：最早的问题已被略去。",
    "full": "{most} 个名额已满，请几分钟后再试。",
    "busy": "上一个问题还在回答中。请先停止它，或等待回答结束。",
    "too_fast": "每分钟最多提 {most} 个问题，请等待 {seconds} 秒。",
    "too_long": "问题有 {length:,} 个字符，最多接受 {most:,} 个。请缩短问题。",
    "no_room": "问题和图片超过了模型能读的 {most:,} 个词元。请缩短问题，或开始新对话。",
    "too_many_pictures": "一次对话最多 {most} 张图片。请开始新对话。",
    "too_many_turns": "本次对话已有 {most} 个问题。请开始新对话。",
    "bad_picture": "无法读取“{name}”：文件已损坏，或不是图片。已将其移除。",
    "gone_picture": "“{name}”已不存在，请重新添加。",
    "large_picture": "“{name}”太大：最多接受 {megabytes:,g} MB、1 亿像素。已将其移除。",
    "large_upload": "文件太大：总共最多接受 {megabytes:,g} MB。",
    "no_room_for_uploads": "暂时没有空间存放更多图片，请稍后再试。",
    "many_logins": "密码错误次数过多，请等待一分钟。",
    "bad_setting": "{name}必须在 {least:g} 到 {most:g} 之间。",
    "nothing_asked": "请输入问题。",
    "ended": "本次对话已结束，请开始新对话。",
    "gone": "该问题已不存在，请重新提问。",
    "out_of_memory": "模型内存不足。请减少图片，或开始新对话。",
    "failed": "模型无法回答。请重试，或开始新对话。",
    "example_colour": "这幅图像描述了什么？",
    "example_shape": "图中是什么形状？",
    "example_two": "这两幅图像描述了什么？",
    "example_photo": "使用语言描述一下图中出现了哪些颜色",
}

WORDS = {"en": ENGLISH, "zh": CHINESE}


class Refusal(Exception):
    """What a visitor asked for and does not get; says why, in the visitor's language."""

    def __init__(self, key: str, **values: object) -> None:
        super().__init__(key, values)
        self.key, self.values = key, values

    def say(self, language: str) -> str:
        """Return the message."""
        return say(language, self.key, **self.values)


def say(language: str, key: str, **values: object) -> str:
    """Return one of the texts, with values filled in."""
    return WORDS[language][key].format(**values)


def language_of(accept_language: str) -> str:
    """Return the page's language for a browser's `Accept-Language`: zh if Chinese is its first choice, otherwise en."""
    choices = []
    for number, part in enumerate(accept_language.split(",")[:20]):
        name, _, quality = part.strip().partition(";q=")
        try:
            choices.append((-float(quality or 1), number, name.lower()))
        except ValueError:
            continue
    return "zh" if choices and min(choices)[2].split("-")[0] == "zh" else "en"
