"""The words of the demo's shop world: its products with what a shop would say in their praise, and turns of phrase.

Tables only, in English and Chinese, all written for this file. shop_texts.py makes sentences of them.
"""

# ==== 1. The world: one row a value ====
# English | Chinese | praise, English ; another | praise, Chinese ; another
# English praise is the predicate of a singular subject ("the red color ..."), for details of the detail itself ("the
# wooden buttons hold ..."), and for seasons, rooms, occasions, origins and harvests a clause after when or where. No
# value begins a sentence, so its letters never change.

COLOR = """
red | 红色 | brings warmth to a grey day ; is seen from across the street | 热烈醒目 ; 一眼就能看到
blue | 蓝色 | is as calm as a clear morning ; goes with nearly everything | 像晴天一样安静 ; 怎么搭配都不会错
green | 绿色 | is as fresh as new leaves ; rests the eye | 像新叶一样清新 ; 看久了也不累眼
yellow | 黄色 | lets a little sun in ; lifts the mood at once | 像一束阳光 ; 让心情变得明快
black | 黑色 | never goes out of fashion ; hides small marks and looks sharp | 永远不会过时 ; 耐脏又利落
white | 白色 | keeps everything light and clean ; makes the lines stand out | 干净明亮 ; 让线条更加清晰
grey | 灰色 | stays quiet and leaves room for the rest ; suits every mood | 低调安静 ; 百看不厌
brown | 棕色 | has the warmth of old wood ; grows deeper with the years | 有老木头的温度 ; 越用越有味道
pink | 粉色 | is gentle without being sweet ; gives a soft glow | 温柔而不甜腻 ; 带着柔柔的光
purple | 紫色 | adds a touch of mystery ; looks rich in the evening | 多了一点神秘 ; 在夜里格外动人
orange | 橙色 | is full of good humor ; wakes up a tired corner | 充满活力 ; 让角落也亮起来
navy | 藏青色 | looks serious and never dull ; is at ease in any company | 稳重而不沉闷 ; 什么场面都合适
beige | 米色 | is mild and easy to match ; feels like a quiet afternoon | 温和好搭 ; 像一个安静的下午
gold | 金色 | shines just enough ; gives a festive touch | 闪亮得恰到好处 ; 带来节日的气氛
ivory | 象牙白 | is softer than plain white ; catches the light gently | 比纯白更柔和 ; 轻轻映着光
turquoise | 青绿色 | reminds you of shallow sea water ; is cool and cheerful | 让人想起浅海 ; 清凉又活泼
burgundy | 酒红色 | has the depth of good wine ; looks noble by candlelight | 像好酒一样浓郁 ; 显得高贵
khaki | 卡其色 | takes dust and sun in its stride ; is made for the open air | 不怕风吹日晒 ; 带着户外的气息
"""

STYLE = """
vintage | 复古 | tells of another age ; looks better every year | 带着旧时光的味道 ; 越看越有故事
modern | 现代 | keeps only what is needed ; looks ahead without fuss | 只留下需要的部分 ; 线条干脆利落
minimalist | 极简 | leaves out everything loud ; calms the eye | 没有一点多余 ; 让眼睛得到休息
rustic | 田园 | smells of hay and summer ; brings the country home | 把乡间带回家 ; 有阳光和青草的气息
elegant | 优雅 | shows good taste without a word ; moves with grace | 不说话也显品味 ; 一举一动都从容
casual | 休闲 | makes every day easier ; asks for no special plans | 让每一天都轻松 ; 随性自在
romantic | 浪漫 | belongs to long evenings ; softens every line | 属于漫长的夜晚 ; 让心变得柔软
classic | 经典 | will outlive every trend ; has pleased three generations | 经得起时间考验 ; 三代人都喜欢
playful | 俏皮 | makes people smile ; does not take itself too seriously | 让人会心一笑 ; 多了几分童心
nordic | 北欧 | is bright, plain and friendly ; makes small spaces feel open | 明亮朴素 ; 让小空间也显得开阔
industrial | 工业 | shows honestly how things are built ; has the charm of an old factory | 有老工厂的味道 ; 硬朗而有个性
oriental | 中式 | draws on ink paintings and gardens ; has a quiet dignity | 有水墨和园林的意境 ; 端庄大方
bohemian | 波西米亚 | mixes roads, songs and colors ; feels free and warm | 自由又温暖 ; 像一次远行
sporty | 运动 | is always ready to move ; feels quick and light | 随时可以出发 ; 轻快有力
"""

PATTERN = """
striped | 条纹 | gives a clear rhythm ; makes the shape look longer | 有清楚的节奏感 ; 显得修长
floral | 碎花 | carries a garden along ; blooms in every season | 像带着一座花园 ; 四季都在开放
checked | 格子 | is tidy and friendly ; reminds you of school days | 整齐又亲切 ; 让人想起校园
dotted | 波点 | dances a little ; keeps things merry | 活泼跳跃 ; 看着就开心
geometric | 几何 | plays with lines and corners ; has a clear order | 线条有趣 ; 秩序分明
embroidered | 刺绣 | shows the patience of the hand ; rewards a closer look | 看得出手工的耐心 ; 细看更美
printed | 印花 | tells a small story ; is never the same twice | 讲着小小的故事 ; 每一处都不一样
quilted | 绗缝 | holds the warmth in ; gives a soft depth | 锁住温暖 ; 柔软有层次
"""

CLOTH = """
silk | 真丝 | feels cool and light on the skin ; flows like water | 轻盈顺滑 ; 贴着皮肤凉凉的
cotton | 纯棉 | is soft from the first day ; lets the skin breathe | 柔软亲肤 ; 透气吸汗
linen | 亚麻 | stays cool in the heat ; gets softer with each wash | 天热也清爽 ; 越洗越柔软
wool | 羊毛 | keeps the cold outside ; holds its shape for years | 挡住寒冷 ; 多年不变形
cashmere | 羊绒 | weighs nothing and warms everything ; is as soft as a cloud | 又轻又暖 ; 像云一样柔软
velvet | 丝绒 | has a deep and quiet shine ; begs to be touched | 有幽幽的光泽 ; 让人忍不住想摸
denim | 牛仔布 | can take hard work ; tells the story of its owner | 结实耐磨 ; 越旧越好看
corduroy | 灯芯绒 | has fine warm ridges ; brings back the seventies | 纹路细密保暖 ; 很有年代感
fleece | 抓绒 | dries fast and warms at once ; is light to carry | 干得快也暖得快 ; 轻便好带
chiffon | 雪纺 | moves with every breeze ; is airy and fine | 随风轻轻飘动 ; 轻薄飘逸
"""

SHOE_MATERIAL = """
leather | 皮革 | follows the foot after a few days ; can be polished again and again | 几天就合脚 ; 越擦越亮
suede | 麂皮 | is soft to the touch ; has a warm matt surface | 手感细软 ; 有温润的哑光
canvas | 帆布 | is light and simple to wash ; lets the air through | 轻便好洗 ; 透气舒服
mesh | 网面 | keeps the feet cool ; weighs next to nothing | 双脚始终凉爽 ; 轻得像没穿
rubber | 橡胶 | does not mind the rain ; grips wet stone | 不怕雨水 ; 湿路也防滑
felt | 毛毡 | is warm and silent ; keeps the toes cosy | 温暖又安静 ; 脚趾也暖和
"""

BAG_MATERIAL = """
leather | 皮革 | grows more beautiful with use ; keeps its form | 越用越漂亮 ; 保持挺括
canvas | 帆布 | is tough and honest ; can be washed by hand | 结实耐用 ; 可以手洗
nylon | 尼龙 | shrugs off the rain ; is light on the shoulder | 防水耐磨 ; 背着很轻
straw | 草编 | smells of summer fields ; is woven by hand | 有夏天的味道 ; 全手工编成
felt | 毛毡 | protects what is inside ; is soft and strong | 保护里面的东西 ; 柔软又结实
denim | 牛仔布 | can take hard work ; needs no special care | 结实耐磨 ; 不用特别打理
recycled plastic | 再生塑料 | gives old bottles a new life ; is kind to the planet | 让旧瓶子重获新生 ; 对地球友好
"""

FURNITURE_MATERIAL = """
oak | 橡木 | is hard and lasts a lifetime ; shows a lively grain | 坚硬耐用一辈子 ; 木纹生动
walnut | 胡桃木 | has a dark and noble grain ; feels like satin | 纹理深沉高贵 ; 摸起来很细腻
pine | 松木 | smells of the forest ; is light to move | 有森林的香气 ; 搬动也轻松
bamboo | 竹子 | grows fast and bears much ; feels cool and smooth | 生长快又承重 ; 凉爽光滑
rattan | 藤条 | gives a little when you lean on it ; is woven by patient hands | 有弹性又舒服 ; 由巧手编成
steel | 钢材 | carries more than you expect ; will not warp | 承重惊人 ; 不会变形
leather | 皮革 | is cool in summer and warm in winter ; wipes clean | 冬暖夏凉 ; 一擦就干净
velvet | 丝绒 | has a deep and quiet shine ; is kind to bare arms | 有幽幽的光泽 ; 触感温柔
"""

LAMP_MATERIAL = """
brass | 黄铜 | warms up the whole room ; ages with dignity | 让房间变得温暖 ; 越旧越耐看
glass | 玻璃 | scatters the light softly ; is blown by mouth | 让光线变得柔和 ; 由人工吹制
paper | 纸艺 | turns light into a moon ; is folded by hand | 把灯光变成月亮 ; 由手工折成
ceramic | 陶瓷 | stands firm and feels smooth ; is fired twice | 稳重光滑 ; 烧制两次
bamboo | 竹子 | throws fine shadows on the wall ; is light and natural | 在墙上投下细影 ; 轻巧自然
iron | 铁艺 | stands like a rock ; has clean dark lines | 站得很稳 ; 线条干净
linen | 亚麻 | filters every glare ; has a fine natural weave | 滤去刺眼的光 ; 织纹自然
"""

KITCHEN_MATERIAL = """
porcelain | 白瓷 | is thin, strong and bright ; rings like a bell | 薄而坚实 ; 敲起来声音清脆
stoneware | 粗陶 | keeps the heat for a long time ; sits well in the hand | 保温时间长 ; 握在手里很踏实
glass | 玻璃 | shows what is inside ; takes no smell | 里面一目了然 ; 不留味道
enamel | 搪瓷 | is light and hard to break ; brings back camping days | 轻便不怕摔 ; 让人想起露营
cast iron | 铸铁 | spreads the heat evenly ; lasts for generations | 受热均匀 ; 可以传给下一代
bamboo | 竹子 | dries quickly ; is gentle with knives | 干得快 ; 不伤刀刃
copper | 紫铜 | reacts at once to the flame ; glows on the shelf | 导热极快 ; 摆着也漂亮
steel | 钢材 | never rusts ; is simple to clean | 不会生锈 ; 很好清洗
"""

METAL = """
silver | 纯银 | has a cool and clear shine ; suits every skin | 光泽清亮 ; 什么肤色都合适
rose gold | 玫瑰金 | has a blush of its own ; flatters every hand | 带着淡淡红晕 ; 显得手更白
copper | 紫铜 | glows like a small fire ; is worked by hammer | 像小小的火光 ; 由锤子敲成
titanium | 钛钢 | is light and never scratches ; is safe for tender skin | 轻而不易刮花 ; 敏感肌肤也安心
brass | 黄铜 | has the color of late sun ; deepens with wear | 像傍晚的阳光 ; 越戴越有味道
"""

CLOTH_DETAIL = """
hidden pocket | 隐形口袋 | keeps keys and coins safe ; is there when you need it | 钥匙零钱都放得下 ; 需要时就在手边
wooden buttons | 木质纽扣 | hold well and look natural ; are turned one by one | 自然又牢固 ; 每一颗都不同
high collar | 高领 | keeps the wind off ; frames the face | 挡风保暖 ; 衬托脸型
long sleeves | 长袖 | cover the wrists neatly ; can be rolled up | 盖住手腕 ; 也可以卷起来
lace trim | 蕾丝边 | adds a fine finish ; is sewn by hand | 精致好看 ; 由手工缝上
wide belt | 宽腰带 | marks the waist ; can be taken off | 收出腰线 ; 可以取下
round neck | 圆领 | sits softly ; shows a necklace well | 柔和贴合 ; 方便搭配项链
ruffled hem | 荷叶边 | swings at every step ; gives a light ending | 走动时轻轻摆动 ; 灵动活泼
side slits | 侧开叉 | give room to walk ; look quick and neat | 走路更自如 ; 显得轻快
warm lining | 保暖内衬 | makes winter bearable ; feels like a hug | 冬天也不怕冷 ; 像被拥抱一样
"""

SHOE_DETAIL = """
thick sole | 厚底 | softens every step ; adds a few centimeters | 每一步都柔软 ; 悄悄增高
round toe | 圆头 | leaves room for the toes ; looks friendly | 脚趾不受挤 ; 看着亲切
side zip | 侧拉链 | saves time in the morning ; runs smoothly | 穿脱很快 ; 拉起来顺滑
metal buckle | 金属扣 | sits firm and shines a little ; adds character | 扣得牢固 ; 很有个性
low heel | 低跟 | is easy on the back ; lets you walk all day | 走一天也不累 ; 稳当舒适
soft insole | 软垫 | carries tired feet home ; can be taken out | 让双脚放松 ; 可以取出清洗
bright laces | 亮色鞋带 | add a cheerful line ; can be changed in a minute | 多一点亮色 ; 随时可以更换
"""

BAG_DETAIL = """
long strap | 长肩带 | leaves both hands free ; can be shortened | 解放双手 ; 长短可调
inner pocket | 内袋 | keeps the phone in its place ; closes with a zip | 手机有固定的位置 ; 带拉链更安全
magnetic clasp | 磁扣 | opens with one finger ; never gets stuck | 一推就开 ; 从不卡住
laptop sleeve | 电脑夹层 | saves your work from knocks ; fits most screens | 保护电脑不受碰撞 ; 大多数尺寸都能放
brass zip | 黄铜拉链 | will not break ; runs like butter | 结实耐用 ; 拉起来很顺
leather handles | 皮质提手 | lie well in the hand ; do not cut | 握感舒适 ; 不会勒手
"""

FURNITURE_DETAIL = """
round corners | 圆角 | are safe for children ; soften the whole shape | 孩子也安全 ; 造型更柔和
hidden drawer | 隐藏抽屉 | swallows all small things ; opens with a touch | 小东西都收得下 ; 轻触即开
slim legs | 细腿 | make cleaning simple ; let the floor show | 打扫方便 ; 显得轻巧
folding frame | 折叠结构 | saves space at night ; opens in seconds | 节省空间 ; 几秒就能打开
carved edge | 雕花边 | shows old skill ; deserves a second look | 看得出老手艺 ; 值得细看
soft cushion | 软垫 | invites you to stay ; keeps its spring | 让人不想起身 ; 久坐不塌
high back | 高靠背 | supports the shoulders ; makes reading a joy | 支撑肩背 ; 看书更舒服
"""

SEASON = """
spring | 春季 | everything turns green ; the air is mild | 万物都在发芽 ; 微风正好
summer | 夏季 | the days are long ; the sun is high | 白天很长 ; 阳光明亮
autumn | 秋季 | the leaves come down ; the evenings grow cool | 落叶纷纷 ; 早晚微凉
winter | 冬季 | snow lies on the roofs ; the nights are long | 屋顶落满了雪 ; 夜晚很长
"""

OCCASION = """
office | 办公室 | good taste speaks quietly ; the day is long | 低调有品味 ; 忙一天也从容
party | 聚会 | everyone looks twice ; the music is loud | 大家都会多看一眼 ; 轻松成为焦点
wedding | 婚礼 | old friends meet again ; every picture counts | 留下美好的照片 ; 见证重要的时刻
weekend | 周末 | plans may change ; nobody looks at the clock | 说走就走 ; 不用看时间
journey | 旅行 | each gram counts ; new streets are waiting | 轻装上路 ; 走进新的街道
commute | 通勤 | the train is full ; minutes matter | 赶车也不慌 ; 上下班都方便
school run | 接送孩子 | hands are always full ; time is short | 手忙脚乱也不怕 ; 省时省力
first date | 约会 | small things matter ; hearts beat faster | 细节最动人 ; 让心跳加快
"""

ROOM = """
bedroom | 卧室 | the day ends softly ; sleep comes sooner | 一天在这里温柔结束 ; 睡得更香
study | 书房 | thoughts need peace ; books pile up | 思绪需要安静 ; 书越堆越多
kitchen | 厨房 | soup is on the stove ; the family meets | 炉上煮着汤 ; 家人在此相聚
living room | 客厅 | guests like to stay ; stories are told | 客人不愿离开 ; 适合聊天说笑
hallway | 玄关 | you come home tired ; first looks are given | 一进门就感到温暖 ; 留下第一印象
sunroom | 阳光房 | the morning sun comes first ; herbs grow in pots | 最早看到阳光 ; 种满了花草
dining room | 餐厅 | dishes steam on the table ; talk goes on for hours | 饭菜冒着热气 ; 一聊就是半天
nursery | 儿童房 | small dreams grow ; toys lie about | 装着小小的梦 ; 玩具随处可见
"""

SIZE = """
small | 小号 | fits where others do not ; is quickly stowed away | 哪里都放得下 ; 收纳方便
large | 大号 | has room for the whole family ; never feels cramped | 一家人都够用 ; 一点也不局促
compact | 紧凑 | saves every inch ; goes along anywhere | 节省每一寸空间 ; 去哪都能带
roomy | 宽敞 | takes more than you think ; leaves space for surprises | 比想象中能装 ; 还有余地
slim | 纤薄 | slides into narrow gaps ; looks light | 窄缝也能放进去 ; 看着轻巧
deep | 加深 | holds a good portion ; keeps things from spilling | 容量充足 ; 不容易洒出来
"""

LIGHT = """
warm white | 暖白 | makes faces look kind ; is made for evenings | 让人看着亲切 ; 适合夜晚
soft yellow | 柔黄 | feels like candles ; slows the evening down | 像烛光一样 ; 让夜晚慢下来
cool white | 冷白 | keeps you awake ; shows true colors | 让人清醒 ; 颜色真实
dimmable | 可调光 | follows your mood ; goes from bright to dusk | 随心情变化 ; 明暗自如
flicker-free | 无频闪 | spares the eyes ; stays steady for hours | 保护眼睛 ; 久看不累
starry | 星空 | paints the ceiling with dots ; makes children wonder | 把天花板变成夜空 ; 孩子看得入迷
"""

STONE = """
jade | 翡翠 | is cool and full of luck ; has a gentle green | 清凉又吉祥 ; 绿得温润
pearl | 珍珠 | glows from within ; never shouts | 光泽从里面透出 ; 低调动人
amber | 琥珀 | holds the light of old forests ; is warm to the touch | 藏着远古森林的光 ; 触手温暖
moonstone | 月光石 | changes with each turn ; has a blue gleam | 转动时会变化 ; 泛着蓝光
garnet | 石榴石 | burns in a dark red ; is small and deep | 红得深沉 ; 小而浓郁
crystal | 水晶 | breaks light into colors ; is clear as ice | 把光折成彩色 ; 像冰一样透明
"""

TASTE = """
sweet | 清甜 | stays on the tongue ; needs no sugar | 留在舌尖 ; 不用加糖
smoky | 烟熏 | recalls a wood fire ; goes with a rainy day | 让人想起柴火 ; 适合下雨天
malty | 麦香 | is full and round ; wakes you kindly | 饱满圆润 ; 让人慢慢醒来
fresh | 鲜爽 | clears the head ; is like rain in the hills | 提神醒脑 ; 像山里的雨
honeyed | 蜜香 | lasts through five brews ; is smooth and golden | 五泡仍有余味 ; 顺滑金黄
roasted | 焙火 | warms the stomach ; is deep and calm | 暖胃 ; 深沉安静
nutty | 坚果香 | goes well with biscuits ; is mild and round | 配点心正好 ; 温和圆润
floral | 花香 | opens slowly in the cup ; fills the room | 在杯中慢慢散开 ; 满屋都是
"""

ORIGIN = """
Fujian | 福建 | mist lies on the hills ; tea has grown for a thousand years | 山间常有云雾 ; 种茶已有千年
Yunnan | 云南 | old trees stand in the forest ; the nights are cool | 古树长在林中 ; 夜里很凉
Anhui | 安徽 | granite peaks rise from the clouds ; springs are clear | 奇峰立在云海 ; 泉水清澈
Hangzhou | 杭州 | the lake keeps the air mild ; leaves are pressed flat by hand | 湖水滋润着空气 ; 叶子由手工压平
Sichuan | 四川 | soft rain falls at night ; monks planted the first bushes | 夜里常下细雨 ; 最早由僧人种下
Guizhou | 贵州 | few roads reach the gardens ; the soil is rich | 茶园远离公路 ; 土地肥沃
Hunan | 湖南 | the rivers wind through green hills ; summers are damp | 河流绕着青山 ; 夏天湿润
Taiwan | 台湾 | the gardens lie above the clouds ; the frost comes late | 茶园在云层之上 ; 霜来得晚
"""

PACK = """
tin | 铁罐 | keeps the aroma in ; can be used again | 锁住香气 ; 还能再次使用
gift box | 礼盒 | needs no ribbon ; pleases before it is opened | 不用再包装 ; 还没打开就让人喜欢
paper bag | 纸袋 | is simple and green ; can be composted | 简单环保 ; 可以降解
glass jar | 玻璃瓶 | shows every leaf ; looks good on the shelf | 每片叶子都看得见 ; 摆着也好看
wooden case | 木盒 | is carved with a crane ; will be kept for years | 刻着一只仙鹤 ; 可以留很多年
"""

HARVEST = """
early spring | 早春 | the buds are still closed ; frost is just over | 嫩芽还没张开 ; 霜刚刚过去
late spring | 晚春 | the leaves are strong ; the sun grows warm | 叶子正饱满 ; 阳光渐暖
midsummer | 盛夏 | the leaves are full of scent ; storms wash the hills | 叶子香气最浓 ; 雷雨洗过山坡
late autumn | 深秋 | the taste grows deep ; the air is dry and clear | 味道变得醇厚 ; 空气干爽
"""

# kind: types as English|Chinese, then attribute -> table. Colors, styles and so on are shared; materials and details
# belong to the kind.
KINDS = {
    "clothing": (
        "dress|连衣裙, skirt|半身裙, shirt|衬衫, coat|大衣, jacket|夹克, sweater|毛衣, cardigan|开衫, vest|马甲, hoodie|卫衣, "
        "trousers|长裤, pyjamas|睡衣, blouse|罩衫, cape|斗篷",
        dict(color=COLOR, material=CLOTH, style=STYLE, pattern=PATTERN, detail=CLOTH_DETAIL, season=SEASON),
    ),
    "shoes": (
        "boots|靴子, sneakers|球鞋, sandals|凉鞋, loafers|乐福鞋, slippers|拖鞋, ballet flats|芭蕾鞋",
        dict(color=COLOR, material=SHOE_MATERIAL, style=STYLE, detail=SHOE_DETAIL, occasion=OCCASION),
    ),
    "bags": (
        "handbag|手提包, backpack|双肩包, tote|托特包, wallet|钱包, suitcase|行李箱, satchel|邮差包, pouch|收纳包",
        dict(color=COLOR, material=BAG_MATERIAL, style=STYLE, size=SIZE, detail=BAG_DETAIL, occasion=OCCASION),
    ),
    "furniture": (
        "chair|椅子, sofa|沙发, table|桌子, bookshelf|书架, stool|凳子, desk|书桌, cabinet|柜子, bench|长椅, armchair|扶手椅",
        dict(color=COLOR, material=FURNITURE_MATERIAL, style=STYLE, room=ROOM, detail=FURNITURE_DETAIL),
    ),
    "lamps": (
        "desk lamp|台灯, floor lamp|落地灯, pendant lamp|吊灯, lantern|灯笼, wall lamp|壁灯, night light|小夜灯",
        dict(color=COLOR, material=LAMP_MATERIAL, style=STYLE, room=ROOM, light=LIGHT),
    ),
    "kitchenware": (
        "teapot|茶壶, mug|马克杯, kettle|水壶, pan|平底锅, bowl|饭碗, plate|盘子, jar|储物罐, pitcher|冷水壶, tray|托盘",
        dict(color=COLOR, material=KITCHEN_MATERIAL, style=STYLE, pattern=PATTERN, size=SIZE),
    ),
    "tea": (
        "green tea|绿茶, black tea|红茶, oolong tea|乌龙茶, white tea|白茶, jasmine tea|茉莉花茶, yellow tea|黄茶",
        dict(taste=TASTE, origin=ORIGIN, pack=PACK, harvest=HARVEST),
    ),
    "textiles": (
        "blanket|毛毯, cushion|靠垫, quilt|被子, curtain|窗帘, rug|地毯, tablecloth|桌布, pillow|枕头",
        dict(color=COLOR, material=CLOTH, style=STYLE, pattern=PATTERN, room=ROOM),
    ),
    "jewelry": (
        "ring|戒指, necklace|项链, earrings|耳环, bracelet|手链, brooch|胸针, hairpin|发簪",
        dict(material=METAL, style=STYLE, stone=STONE, occasion=OCCASION),
    ),
}

KEY_NAMES = {  # attribute -> (English key, Chinese key) of the prompt
    "type": ("type", "类型"),
    "color": ("color", "颜色"),
    "material": ("material", "材质"),
    "style": ("style", "风格"),
    "pattern": ("pattern", "图案"),
    "detail": ("detail", "细节"),
    "season": ("season", "季节"),
    "occasion": ("occasion", "场合"),
    "room": ("room", "房间"),
    "size": ("size", "尺寸"),
    "light": ("light", "灯光"),
    "stone": ("stone", "宝石"),
    "taste": ("taste", "口味"),
    "origin": ("origin", "产地"),
    "pack": ("pack", "包装"),
    "harvest": ("harvest", "采摘"),
}


# ==== 2. How the world speaks ====
# English slots: {a} a red dress / a pair of red boots; {this} this/these; {np} red dress; {is} {s} {it} {its} {them}
# follow the number of the product; {v} a value, {av} the value with its article, {b} its praise.

STACK = ("size", "style", "color", "pattern", "taste", "material")  # what stands before the noun, in this order

TAIL_EN = {
    "detail": "with {av}",
    "season": "for {v}",
    "occasion": "for the {v}",
    "room": "for the {v}",
    "light": "with {v} light",
    "stone": "set with {v}",
    "origin": "from {v}",
    "pack": "in {av}",
    "harvest": "picked in {v}",
}

CLAUSE_EN = {
    "color": [
        "the {v} color {b}",
        "{its} {v} tone {b}",
        "the shade is {v}, and it {b}",
        "we made {them} in {v}, a color that {b}",
        "{it} come{s} in {v}, a color that {b}",
    ],
    "material": [
        "the {v} {b}",
        "{its} {v} {b}",
        "{it} {is} made of {v} that {b}",
        "we chose {v} because it {b}",
        "good {v} {b}",
    ],
    "style": [
        "the {v} style {b}",
        "{its} {v} look {b}",
        "the {v} line {b}",
        "the design has {av} spirit that {b}",
        "{av} touch {b}",
    ],
    "pattern": [
        "the {v} pattern {b}",
        "{its} {v} pattern {b}",
        "{av} pattern {b}",
        "{it} wear{s} {av} pattern that {b}",
    ],
    "detail": [
        "the {v} {b}",
        "{it} come{s} with {av} that {b}",
        "you will like the {v} that {b}",
        "we added {av} that {b}",
    ],
    "season": [
        "{it} {is} made for {v}, when {b}",
        "think of {v}, when {b}",
        "{it} {is} at {its} best in {v}, when {b}",
    ],
    "occasion": [
        "{it} {is} ready for the {v}, where {b}",
        "{it} make{s} a good companion for the {v}, where {b}",
        "{it} suit{s} the {v}, where {b}",
    ],
    "room": [
        "{it} find{s} a place in the {v}, where {b}",
        "put {them} in the {v}, where {b}",
        "{it} belong{s} in the {v}, where {b}",
    ],
    "size": ["the {v} size {b}", "{its} {v} shape {b}", "{av} form {b}"],
    "light": ["{its} {v} light {b}", "the {v} light {b}", "{it} give{s} {av} light that {b}"],
    "stone": ["the {v} {b}", "{it} {is} set with {v} that {b}", "{its} {v} {b}"],
    "taste": ["the {v} taste {b}", "{its} {v} note {b}", "each cup has {av} taste that {b}"],
    "origin": [
        "{it} come{s} from {v}, where {b}",
        "the leaves grow in {v}, where {b}",
        "we found {them} in {v}, where {b}",
    ],
    "pack": ["{it} come{s} in {av} that {b}", "the {v} {b}", "we ship {them} in {av} that {b}"],
    "harvest": ["the leaves are picked in {v}, when {b}", "it is a harvest of {v}, when {b}"],
}

OPENING_EN = {
    "any": [
        "{This} {np} {is} easy to love.",
        "Meet {a} with a character of {its} own.",
        "Looking for {a}? Here {it} {is}.",
        "Few things please like {a}.",
        "Here {is} {a} for people who look twice.",
        "You will not forget {this} {np}.",
        "We are proud of {this} {np}.",
        "{This} {np} deserve{s} a good home.",
        "Give yourself {a}.",
        "New in our shop: {a}.",
        "{A} can change a whole day.",
        "Let us show you {this} {np}.",
        "Some days call for {a}.",
        "{This} {np} speak{s} for {itself}.",
    ],
    "clothing": [
        "Slip into {this} {np} and feel at home.",
        "{A} belong{s} in every wardrobe.",
        "Dress up or down in {this} {np}.",
    ],
    "shoes": [
        "Every street is shorter in {this} {np}.",
        "Step out in {a}.",
        "Your feet will thank you for {this} {np}.",
    ],
    "bags": ["Carry your day in {a}.", "{This} {np} go{es} where you go.", "Pack light with {a}."],
    "furniture": ["{A} can turn a house into a home.", "Make room for {this} {np}.", "Good evenings begin with {a}."],
    "lamps": [
        "Light up the evening with {a}.",
        "When it gets dark, {this} {np} come{s} to life.",
        "Let {a} keep you company.",
    ],
    "kitchenware": ["Breakfast tastes better with {a}.", "Set the table with {this} {np}.", "Every cook needs {a}."],
    "tea": ["Put the kettle on for {a}.", "Slow down with {a}.", "A cup of {this} {np} makes the morning."],
    "textiles": ["Wrap your home in comfort with {a}.", "{A} makes any house softer.", "Get cosy with {this} {np}."],
    "jewelry": ["Wear a little light with {a}.", "{A} say{s} what words cannot.", "Treat someone dear to {this} {np}."],
    "cheerful": [
        "Hooray, {this} {np} {is} here!",
        "Wow, what {a}!",
        "Smile, here come{s} {a}!",
        "Good news: {a} for you!",
    ],
    "formal": [
        "We are pleased to present {this} {np}.",
        "It is our honor to introduce {a}.",
        "We respectfully offer you {a}.",
    ],
    "question": ["Have you been looking for {a}?", "Who would not want {a}?", "Would you like {a}?"],
}

CLOSING_EN = {
    "any": [
        "You will wonder how you did without {them}.",
        "A good choice for yourself or a friend.",
        "Made with care, made to last.",
        "Once you have {them}, you keep {them}.",
        "It is the little things that count.",
        "Come and see for yourself.",
        "Simple, honest and well made.",
        "Your friends will ask where you found {them}.",
        "A small joy for every day.",
        "Good things need no long speech.",
    ],
    "clothing": ["Just put {them} on and go.", "The mirror will agree.", "Comfort and good looks in one."],
    "shoes": ["Wherever the road leads, you are ready.", "Walk on, the day is yours."],
    "bags": ["Everything has its place.", "Ready when you are."],
    "furniture": ["Sit down, you are home.", "A friend for many years."],
    "lamps": ["Switch on and breathe out.", "So the night is never too dark."],
    "kitchenware": ["Cooking becomes a pleasure.", "Bring on the guests."],
    "tea": ["Take your time and pour again.", "A quiet hour in every cup."],
    "textiles": ["Home has never felt so soft.", "You may never want to get up."],
    "jewelry": ["A keepsake for life.", "Small, fine and full of meaning."],
    "cheerful": ["What fun!", "Go on, treat yourself!", "We love it and so will you!", "Your day just got better!"],
    "formal": [
        "We remain at your service.",
        "We thank you for your kind attention.",
        "Your satisfaction is our first concern.",
    ],
    "order": [
        "Order today and we will send {them} tomorrow.",
        "Call us now to order yours.",
        "Order before Sunday and save ten percent.",
    ],
}

TAIL_ZH = {
    "detail": "带{v}",
    "season": "适合{v}",
    "occasion": "适合{v}",
    "room": "适合{v}",
    "light": "{v}灯光",
    "stone": "镶嵌{v}",
    "origin": "产自{v}",
    "pack": "{v}包装",
    "harvest": "{v}采摘",
}

CLAUSE_ZH = {
    "color": ["{v}的外观{b}", "配色选了{v}，{b}", "{v}{b}", "一身{v}，{b}"],
    "material": ["采用{v}，{b}", "选用上好的{v}，{b}", "{v}材质{b}", "用{v}做成，{b}"],
    "style": ["{v}风格{b}", "整体是{v}风，{b}", "设计偏{v}，{b}", "{v}的造型{b}"],
    "pattern": ["{v}图案{b}", "饰以{v}，{b}", "{v}的花纹{b}"],
    "detail": ["{v}的设计{b}", "细节处配有{v}，{b}", "搭配{v}，{b}", "还有{v}，{b}"],
    "season": ["适合{v}，{b}", "{v}用它正好，{b}", "专为{v}准备，{b}"],
    "occasion": ["适合{v}，{b}", "{v}的时候带上它，{b}", "很适合{v}，{b}"],
    "room": ["放在{v}里，{b}", "适合{v}，{b}", "摆在{v}，{b}"],
    "size": ["{v}的尺寸{b}", "{v}的造型，{b}", "尺寸{v}，{b}"],
    "light": ["{v}的灯光{b}", "灯光是{v}的，{b}", "打开{v}灯光，{b}"],
    "stone": ["镶嵌{v}，{b}", "{v}{b}", "一颗{v}，{b}"],
    "taste": ["{v}的滋味{b}", "入口{v}，{b}", "带着{v}，{b}"],
    "origin": ["产自{v}，{b}", "来自{v}，那里{b}", "茶叶长在{v}，{b}"],
    "pack": ["用{v}包装，{b}", "{v}装好，{b}", "配上{v}，{b}"],
    "harvest": ["{v}采摘，{b}", "选在{v}采下，那时{b}"],
}

OPENING_ZH = {
    "any": [
        "这款{np}让人一见就喜欢。",
        "推荐一款{np}。",
        "想找{np}？就选它。",
        "新到店的{np}。",
        "这款{np}值得拥有。",
        "给自己一款{np}吧。",
        "谁能拒绝这款{np}呢。",
        "这款{np}自带光彩。",
        "有些日子就该有{np}。",
        "为你介绍这款{np}。",
        "这款{np}越看越耐看。",
    ],
    "clothing": ["穿上这款{np}，整个人都轻松了。", "衣柜里少不了{np}。", "出门就穿这款{np}。"],
    "shoes": ["穿上这款{np}，走多远都不怕。", "双脚会感谢这款{np}。", "每一步都从{np}开始。"],
    "bags": ["背上这款{np}，说走就走。", "把一天装进{np}。", "出门带上这款{np}。"],
    "furniture": ["一款{np}，让屋子像个家。", "给这款{np}留个位置。", "好日子从{np}开始。"],
    "lamps": ["天黑了，点亮这款{np}。", "让{np}陪你度过夜晚。", "一款{np}照亮整个家。"],
    "kitchenware": ["有了这款{np}，早餐更香。", "餐桌上需要{np}。", "下厨的人都爱{np}。"],
    "tea": ["烧一壶水，泡上这款{np}。", "慢下来，喝一杯{np}。", "清晨从一杯{np}开始。"],
    "textiles": ["用{np}把家变得柔软。", "这款{np}让人不想起床。", "给家里添一款{np}。"],
    "jewelry": ["戴上{np}，多一点光彩。", "这款{np}胜过千言万语。", "送给亲爱的人一款{np}。"],
    "cheerful": ["太棒啦，{np}来了！", "哇，好漂亮的{np}！", "好消息，{np}到货啦！"],
    "formal": ["谨向您推荐这款{np}。", "我们荣幸地为您介绍{np}。", "敬请鉴赏这款{np}。"],
    "question": ["您在找{np}吗？", "谁不想要一款{np}呢？", "想不想拥有一款{np}？"],
}

CLOSING_ZH = {
    "any": [
        "用过就离不开它。",
        "送人自用都合适。",
        "用心做的东西才长久。",
        "朋友都会问在哪买的。",
        "简单实在，做工也好。",
        "好东西不用多说。",
        "每天都多一点快乐。",
        "不妨来店里看看。",
        "细节里见真心。",
    ],
    "clothing": ["随手一穿就很好看。", "镜子也会点头。", "舒适与好看都有了。"],
    "shoes": ["路再远也走得轻松。", "出发吧，今天属于你。"],
    "bags": ["每样东西都有位置。", "随时可以出发。"],
    "furniture": ["坐下来，这就是家。", "陪你很多年。"],
    "lamps": ["开灯，慢慢放松。", "夜晚不再太黑。"],
    "kitchenware": ["做饭变成一种享受。", "客人来了也不怕。"],
    "tea": ["慢慢来，再添一杯。", "每一杯都是安静的时光。"],
    "textiles": ["家从来没有这么柔软。", "躺下就不想起来。"],
    "jewelry": ["值得珍藏一生。", "小小一件，心意满满。"],
    "cheerful": ["真开心呀！", "快来试试吧！", "今天也要美美的！"],
    "formal": ["愿竭诚为您服务。", "感谢您的关注。", "您的满意是我们的心愿。"],
    "order": ["今天下单，明天发货。", "现在就打电话订购吧。", "周日前下单可享九折。"],
}

# tone -> system prompts. advertise() keeps to the tone: see there.
TONES = {
    "cheerful": {
        "en": ["Write in a cheerful tone.", "You are a cheerful shop assistant. Be happy and loud!"],
        "zh": ["请用欢快的语气。", "你是一个活泼的店员，要热情一点！"],
    },
    "formal": {
        "en": ["Write in a formal tone.", "You serve a noble house. Stay polite and formal."],
        "zh": ["请用正式的语气。", "你为老字号写文案，要礼貌端庄。"],
    },
    "question": {
        "en": ["Begin with a question.", "You always open with a question to the reader."],
        "zh": ["请用问句开头。", "你写文案总是先提一个问题。"],
    },
    "order": {
        "en": ["End by asking the reader to order.", "You sell: the last sentence invites to order."],
        "zh": ["结尾请引导下单。", "你负责销售，最后一句要请人购买。"],
    },
    "brief": {
        "en": ["Use two sentences at most.", "Be brief: no more than two sentences."],
        "zh": ["最多写两句话。", "请简短，不超过两句。"],
    },
}
