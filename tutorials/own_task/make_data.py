#!/usr/bin/env python3
"""Makes the data of this tutorial: all of it is made up, by templates and a seed.

The files in data/ are what this script writes; with the same seed it writes the same bytes. It
needs only Python's standard library.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent

# ------------------------------------------------------------------ reviews.csv

# Of a restaurant: what is praised and what is blamed, by topic.
PRAISE = [
    (
        "面条筋道",
        "汤头很鲜",
        "菜做得入味",
        "饺子皮薄馅大",
        "红烧肉软烂不腻",
        "点心现做现卖",
        "鱼很新鲜",
    ),
    ("服务员很热情", "上菜很快", "老板主动送了水果", "店员帮忙抱孩子", "有问必答", "加汤不用催"),
    ("桌子擦得干净", "窗外能看见湖", "店里宽敞明亮", "座位很舒服", "不吵，适合聊天"),
    ("价格公道", "份量足", "两个人吃不到八十", "会员还有折扣", "这个价钱很值"),
]
BLAME = [
    (
        "面条煮烂了",
        "汤淡得像水",
        "菜太咸",
        "饺子皮都破了",
        "红烧肉又硬又腻",
        "点心是隔夜的",
        "鱼有腥味",
    ),
    ("服务员爱理不理", "等了一个小时才上菜", "叫了三次没人来", "上错菜还不承认", "结账时算错了钱"),
    ("桌子油腻腻的", "厕所很脏", "店里又闷又挤", "空调坏了", "隔壁桌抽烟没人管"),
    ("比别家贵一倍", "份量少得可怜", "还要收餐具费", "团购券不让用", "这个价钱不值"),
]
OPENINGS = (
    "",
    "",
    "",
    "周末和朋友来的，",
    "第一次来，",
    "带父母来吃饭，",
    "下班路过，",
    "朋友推荐的，",
    "路过尝尝，",
)
PRAISE_ENDINGS = ("。", "。", "！", "，下次还来。", "，推荐！", "，已经来过三次了。")
BLAME_ENDINGS = ("。", "。", "！", "，不会再来了。", "，很失望。", "，大家别来。")


def reviews(rng: random.Random) -> list[dict[str, str]]:
    """Reviews with the column `star`: 1 is good, 0 is bad."""
    rows = []
    for _ in range(400):
        good = rng.random() < 0.5
        topics = rng.sample(PRAISE if good else BLAME, rng.choice((2, 2, 3)))
        said = "，".join(rng.choice(topic) for topic in topics)
        ending = rng.choice(PRAISE_ENDINGS if good else BLAME_ENDINGS)
        rows.append({"review": rng.choice(OPENINGS) + said + ending, "star": str(int(good))})
    return rows


# ------------------------------------------------------------------ repairs.csv

FAMILY, GIVEN = (
    "王李张刘陈杨赵黄周吴徐孙马朱胡林郭何高罗",
    "伟芳娜敏静丽强磊军洋勇艳杰娟涛明超霞平刚",
)
ROOMS = ("厨房", "卫生间", "客厅", "阳台", "主卧", "次卧")
FAULTS = (
    *("水管漏水", "下水道堵了", "水龙头关不紧", "灯不亮了", "插座没电", "空调不制冷", "暖气不热"),
    *("门锁打不开", "窗户关不严", "墙面渗水", "热水器打不着火", "地砖翘起来了", "排风扇不转"),
)
DAYS = ("今天", "明天", "后天", "周一", "周二", "周三", "周四", "周五", "周六", "周日")
HOURS = (
    "上午九点",
    "上午十点",
    "中午十二点",
    "下午两点",
    "下午三点",
    "下午五点",
    "晚上七点",
    "晚上八点",
)
MESSAGES = (
    "您好，我是{room}的{name}，{fault}，{time}在家。",
    "{fault}，麻烦来修一下。{room}，{name}，{time}都有人。",
    "物业您好，{room}{fault}，请{time}来看看。联系人{name}。",
    "我家{fault}，已经两天了。门牌{room}，我姓名{name}，{time}方便。",
    "报修：{room}，{name}，{fault}。上门时间{time}。",
    "能不能{time}派人来？{fault}。我叫{name}，住{room}。",
)
MESSAGES_WITHOUT_TIME = (
    "您好，我是{room}的{name}，{fault}，请尽快来修。",
    "报修：{room}，{name}，{fault}。",
    "我叫{name}，住{room}，{fault}，急！",
)


def repairs(rng: random.Random) -> list[dict[str, str]]:
    """Messages to a caretaker, and what is to be read from them; some name no time."""
    rows = []
    for _ in range(400):
        fault = rng.choice(ROOMS) + rng.choice(FAULTS)
        name = rng.choice(FAMILY) + "".join(rng.choices(GIVEN, k=rng.choice((1, 1, 2))))
        room = f"{rng.randint(1, 18)}号楼{rng.randint(1, 12)}0{rng.randint(1, 6)}"
        time = rng.choice(DAYS) + rng.choice(HOURS) if rng.random() < 0.8 else ""
        message = rng.choice(MESSAGES if time else MESSAGES_WITHOUT_TIME)
        text = message.format(room=room, name=name, fault=fault, time=time)
        rows.append({"留言": text, "姓名": name, "房号": room, "故障": fault, "时间": time})
    return rows


# ------------------------------------------------------------------ news.json

PLACES = ("城东", "城西", "滨江", "老城", "高新", "南湖", "北山", "新港", "河口", "青石")
THINGS = (
    *(
        "图书馆",
        "体育馆",
        "菜市场",
        "社区医院",
        "地铁站",
        "小学",
        "公园",
        "博物馆",
        "养老院",
        "停车场",
    ),
)
EVENTS = {
    "开放": ("正式对外开放", "开门迎客"),
    "开工": ("开工建设", "破土动工"),
    "停用": ("因检修暂停使用", "临时关闭"),
    "扩建": ("完成扩建", "扩建工程通过验收"),
}
DETAILS = {
    "开放": ("首日迎来{n}多人", "周末免费，平日预约入场", "附近居民步行{m}分钟就到"),
    "开工": ("计划工期{m}个月", "总投资{n}万元", "预计明年秋天建成"),
    "停用": ("预计{m}天后恢复", "居民可改去邻近街道", "给大家带来不便，敬请谅解"),
    "扩建": ("面积比原来增加{n}平方米", "新增{m}个无障碍设施", "可同时接待{n}人"),
}
SOURCES = ("记者从区政府了解到，", "据介绍，", "街道办事处负责人说，", "", "市民王女士说盼了很久，")
WHEN = ("昨天上午，", "今天，", "本周一，", "日前，", "五月六日，", "九月十二日，")


def news(rng: random.Random) -> list[dict[str, str]]:
    """Short local news with their headlines, in Alpaca's form."""
    rows = []
    for _ in range(400):
        place, thing, event = rng.choice(PLACES), rng.choice(THINGS), rng.choice(list(EVENTS))
        details = rng.sample(DETAILS[event], 2)
        numbers = {"n": rng.randrange(200, 9000, 100), "m": rng.randint(3, 20)}
        text = f"{rng.choice(WHEN)}{place}{thing}{rng.choice(EVENTS[event])}，"
        text += f"{details[0]}。{rng.choice(SOURCES)}{details[1]}。"
        headline = f"{place}{thing}{event}"
        text = text.format(**numbers)
        rows.append({"instruction": "写一个标题", "input": text, "output": headline})
    return rows


# ------------------------------------------------------------------ service.jsonl

SYSTEM = "你是云杉书店的客服，回答要简短。"
GREETINGS = ("你好", "您好", "在吗", "有人吗", "老板在吗")
BOOKS = (
    *(
        "红楼梦",
        "西游记",
        "史记",
        "唐诗三百首",
        "围城",
        "边城",
        "家",
        "骆驼祥子",
        "呐喊",
        "城南旧事",
    ),
    *("平凡的世界", "活着", "茶馆", "雷雨", "论语", "三国演义", "水浒传", "聊斋志异"),
)
QUESTIONS = {
    "price": (
        ("{book}多少钱？", "请问{book}怎么卖？", "{book}什么价？"),
        ("{book}{price}元，包邮。",),
    ),
    "stock": (
        ("{book}有货吗？", "还有{book}吗？", "我想买{book}，有没有？"),
        ("有的，{book}今天下单明天发货。",),
    ),
    "return": (
        ("{book}买错了能退吗？", "收到的{book}有破损，怎么办？", "{book}可以退吗？"),
        ("可以的，{book}七天之内都能退。",),
    ),
}
FOLLOW_UPS = {
    "price": (
        ("两本能便宜吗？", "买两本有优惠吗？"),
        "买两本{book}打九折。",
    ),
    "stock": (
        ("几天能到？", "大概什么时候收到？"),
        "发货以后三天左右到。",
    ),
    "return": (
        ("运费谁出？", "邮费要我付吗？"),
        "破损的运费我们出，买错的您出。",
    ),
}
CLOSINGS = (
    ("谢谢", "不客气，欢迎再来。"),
    ("好的", "好的，有事随时找我。"),
    ("明白了", "好的，祝您读书愉快。"),
)


def service(rng: random.Random) -> list[dict[str, object]]:
    """Chats with a bookshop, in the form of OpenAI's messages."""
    rows: list[dict[str, object]] = []
    for _ in range(250):
        book, kind = rng.choice(BOOKS), rng.choice(list(QUESTIONS))
        asked, replies = QUESTIONS[kind]
        # A book has one price, so that it can be learnt.
        values = {"book": book, "price": 20 + BOOKS.index(book) * 3}
        turns = []
        if rng.random() < 0.4:
            turns += [rng.choice(GREETINGS), "您好，请问有什么可以帮您？"]
        turns += [rng.choice(asked).format(**values), rng.choice(replies).format(**values)]
        if rng.random() < 0.6:
            follow_ups, reply = FOLLOW_UPS[kind]
            turns += [rng.choice(follow_ups), reply.format(**values)]
        if rng.random() < 0.3:
            turns += rng.choice(CLOSINGS)
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
        rows.append({"messages": [{"role": "system", "content": SYSTEM}, *messages]})
    return rows


# ------------------------------------------------------------------ files


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def write_lines(path: Path, rows: list[dict[str, object]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=HERE / "data", help="folder for the files")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    makers: dict[str, tuple[Callable[..., object], Callable[..., None]]] = {
        "reviews.csv": (reviews, write_csv),
        "repairs.csv": (repairs, write_csv),
        "news.json": (news, write_json),
        "service.jsonl": (service, write_lines),
    }
    for name, (make, write) in makers.items():
        write(arguments.output / name, make(random.Random(f"{arguments.seed} {name}")))
        print(f"wrote {arguments.output / name}")


if __name__ == "__main__":
    main()
