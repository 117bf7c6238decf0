"""The concepts of the generated scenes: for each slot, concepts with plain and verse wordings.

Each line is a concept: plain wordings | verse wordings. The verse wordings of a slot have the same
length (WIDTH), so that a line of verse has 5 or 7 characters. As in real poems, a verse wording
shares a character with the plain wordings; it may share others with other concepts.
"""

from __future__ import annotations

from typing import NamedTuple

WIDTH = {"time": 2, "place": 2, "who": 2, "act": 3, "see": 3}

TABLE = {
    "time": """
清早 大清早 | 清晓 清晨
晚上 夜晚的时候 | 向晚 晚来
春天 到了春天 | 春日 春深
秋天 秋季里 | 秋日 深秋
夏天 夏季里 | 夏日 长夏
冬天 冬季里 | 冬日 残冬
半夜 夜半的时候 | 夜半 中夜
黄昏 天快黄昏时 | 昏时 黄昏
新年 过年的时候 | 年年 年初
从前 从前的时候 | 从来 前朝
今天 到了今天 | 今朝 今日
寒食节 寒食那天 | 寒食 食时
中午 正午的时候 | 日午 午后
雨后 雨停了以后 | 雨余 雨歇
雪后 下过雪以后 | 雪后 雪霁
酒后 喝过酒以后 | 酒醒 酒阑
梦里 做梦的时候 | 梦中 梦回
别后 离别以后 | 别时 别来
""",
    "place": """
江边 大江岸上 | 江头 江畔
山里 大山之中 | 空山 山中
城楼上 高高的城墙上 | 城头 孤城
院子里 小院中 | 小院 深院
寺庙里 古寺中 | 古寺 寺前
船上 小船里 | 船头 孤船
竹林里 竹子丛中 | 竹里 竹下
桥上 石桥边 | 桥边 断桥
路上 大路旁 | 路旁 歧路
边关 边境的关口 | 关外 关山
京城 繁华的京都 | 京华 东京
村子里 小村庄中 | 孤村 村边
家乡 故乡的土地上 | 故乡 他乡
田里 农田中 | 田中 田间
海边 大海之滨 | 沧海 海上
湖面上 平静的湖水上 | 湖上 平湖
花园里 开花的园子中 | 花间 花下
皇宫里 深深的宫殿中 | 深宫 宫中
窗户旁 小窗前面 | 窗前 小窗
旅店里 旅途的客店中 | 旅馆 旅中
松林里 松树下面 | 松下 松间
溪边 小溪旁 | 溪上 清溪
""",
    "who": """
老人 年老的人 | 老翁 衰老
小孩 小孩子 | 小儿 小童
渔夫 打渔的人 | 渔翁 渔父
农夫 种田的农民 | 农人 老农
僧人 出家的僧侣 | 高僧 山僧
将军 带兵的大将 | 将军 老将
美人 美丽的女子 | 美人 美女
客人 远方来的客 | 行客 远客
樵夫 砍柴的樵子 | 樵人 樵翁
牧童 放牧的孩子 | 牧儿 牧子
书生 年轻书生 | 书生 书客
君王 一国之君 | 君主 吾君
歌女 女歌者 | 歌姬 歌者
征人 出征的士兵 | 征夫 征客
友人 好朋友 | 故友 友生
仙人 天上的神仙 | 仙人 仙翁
""",
    "act": """
喝酒 举杯喝酒 | 对酒饮 一杯酒
弹琴 轻轻弹琴 | 自弹琴 鸣琴坐
读书 认真读书 | 夜读书 坐观书
下棋 和人下棋 | 共围棋 看棋局
钓鱼 安静地钓鱼 | 垂钓去 独钓归
写诗 提笔写诗 | 赋新诗 寄诗来
睡觉 正在睡觉 | 犹睡着 睡初觉
唱歌 大声唱歌 | 放歌行 长歌去
哭泣 流泪哭泣 | 泣不休 掩泣归
赏花 欣赏鲜花 | 看花去 折花归
采茶 采摘茶叶 | 采茶归 摘新茶
骑马 骑着马走 | 骑马过 走马来
舞剑 挥舞宝剑 | 拔剑舞 剑如霜
烧香 点香拜佛 | 自焚香 一炷香
望月 抬头望月 | 望月明 对月思
登楼 登上高楼 | 独登楼 更登临
吹笛 吹着竹笛 | 吹玉笛 一声笛
思念亲人 想念家里的亲人 | 思亲泪 念亲归
""",
    "see": """
明月升起 月亮升起来了 | 月初上 明月出
大雪纷飞 下着大雪 | 雪纷纷 雪满天
细雨蒙蒙 下着小雨 | 雨如丝 细雨斜
落叶飘零 树叶落了 | 叶自落 落叶多
桃花盛开 桃树开花了 | 桃花发 桃正红
燕子飞来 燕子在飞 | 燕初飞 双燕来
大雁南飞 雁群飞过 | 雁南归 雁一行
柳树发芽 柳条绿了 | 柳色新 柳如烟
白云飘动 云在天上飘 | 白云飞 云悠悠
风吹过来 刮起了风 | 风乍起 晚风来
流水不停 水流过去了 | 水东流 水潺潺
荷花开放 荷塘开满荷花 | 荷花开 荷风香
菊花金黄 菊花开了 | 菊花黄 菊有霜
梅花开放 梅花开了 | 梅花落 一枝梅
烟雾弥漫 烟雾升起 | 烟漠漠 暮烟生
鸟儿鸣叫 小鸟在叫 | 鸟空啼 众鸟飞
草木茂盛 青草长出来了 | 草萋萋 芳草绿
夕阳落下 太阳西斜 | 夕阳斜 残阳红
蝉声响起 蝉在树上叫 | 蝉声急 听鸣蝉
灯火明亮 点起了灯 | 灯初上 一灯明
""",
}


class Concept(NamedTuple):
    """A concept and its wordings."""

    slot: str
    number: int
    plain: tuple[str, ...]
    verse: tuple[str, ...]


def _read(slot: str, table: str) -> tuple[Concept, ...]:
    concepts = []
    for number, line in enumerate(table.strip().splitlines()):
        plain, verse = line.split("|")
        concepts.append(Concept(slot, number, tuple(plain.split()), tuple(verse.split())))
    return tuple(concepts)


CONCEPTS = {slot: _read(slot, table) for slot, table in TABLE.items()}
