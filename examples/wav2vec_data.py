"""The recordings of examples/wav2vec.py: synthetic words, or your own .wav files.

    recordings = synthetic_words(takes=14)          ten words, twelve voices, made by this file
    recordings = own_recordings(Path("folder"))    .wav files
    split_recordings(recordings, "speakers", 0)    whole speakers are the test

All waves have 8,000 samples a second, mean 0 and standard deviation 1.
"""

import re
import wave
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from minissl import UserError
from minissl.data.batches import generator
from minissl.data.splits import HELD_OUT, TEST, TRAIN
from minissl.training.files import progress
from minissl.training.wording import list_names


RATE = 8000                 # samples a second
HOP = 80                    # samples between two frames: 10 ms
FRAME = 320                 # samples that a frame of the encoder sees
SHORTEST, LONGEST = 0.1, 10              # seconds of a recording; what follows is cut off
CROP = RATE                 # samples that a training step takes of a longer recording: a second
HOW_TO_NAME = "name the files folder/LABEL_SPEAKER_x.wav or folder/LABEL/SPEAKER_x.wav"


@dataclass
class Recordings:
    waves: list             # N arrays of float32 samples
    labels: np.ndarray      # (N,) int64, -1 for a recording without a label
    classes: list           # label -> name
    speakers: np.ndarray    # (N,) int64, -1 for an unknown speaker
    speaker_names: list
    notes: list = field(default_factory=list)
    split: np.ndarray = None             # (N,) uint8, see split_recordings

    def __len__(self):
        return len(self.waves)

    def __getitem__(self, index):
        """A wave, for minissl.data.splits.fingerprint."""
        return self.waves[index]

    def select(self, part, labelled=True):
        """The indices of a part (TRAIN, HELD_OUT or TEST), by default of labelled recordings."""
        chosen = self.split == part
        if labelled:
            chosen = chosen & (self.labels >= 0)
        return np.flatnonzero(chosen)

    def describe(self):
        seconds = sum(map(len, self.waves)) / RATE
        return (
            f"{len(self):,} recordings of {seconds:,.0f} seconds, {len(self.classes)} classes, "
            f"{len(self.speaker_names)} speakers"
        )


def load_recordings(settings):
    """The Recordings that settings.data names, with their split."""
    if settings.data == "words":
        recordings = synthetic_words(settings.takes)
    else:
        recordings = own_recordings(Path(settings.data))
    split_recordings(recordings, settings.test, settings.fold)
    fewest = np.bincount(recordings.labels[recordings.select(TRAIN)]).min()
    if not 1 <= min(settings.labels) <= fewest:
        raise UserError(
            f"--labels {min(settings.labels)}: expected at least 1, and at most {fewest}, the "
            f"recordings that the smallest class has to learn from"
        )
    left_out = [str(count) for count in settings.labels if count > fewest]
    if left_out:
        recordings.notes.append(
            f"the columns {list_names(left_out)} of --labels are left out, because the smallest "
            f"class has {fewest} recordings to learn from"
        )
    for note in [recordings.describe(), *recordings.notes]:
        print(f"data: {note}")
    return recordings


def normalize(samples):
    """Mean 0 and standard deviation 1, as float32. Silence stays silence."""
    samples = samples - samples.mean()
    return (samples / max(samples.std(), 1e-4)).astype(np.float32)


# ---------------------------------------------------------------- splits

def split_recordings(recordings, test, fold):
    """Set recordings.split.

    test "speakers": a third of the speakers is the test, and fold 0, 1 or 2 says which.
    test "takes": the first five recordings of each speaker and class are the test.
    Of the others, every tenth of a speaker and class is held out for choices.
    Recordings without a label are for training; with "speakers" also those without a speaker.
    Raises UserError if there are fewer than two classes, if "speakers" finds fewer than three
    speakers, or if a class has no recording to learn from.
    """
    labels, speakers = recordings.labels, recordings.speakers
    if len(recordings.classes) < 2:
        found = f"only the label {recordings.classes[0]}" if recordings.classes else "no labels"
        raise UserError(f"--data: found {found}, and the table needs two classes; {HOW_TO_NAME}")
    takes = number_takes(labels, speakers)
    known = (labels >= 0) & (speakers >= 0)
    if test == "speakers":
        count = len(recordings.speaker_names)
        if count < 3:
            raise UserError(
                f"--data: found {count} speakers, and --test speakers needs 3; "
                f"{HOW_TO_NAME}, or give --test takes"
            )
        third = max(1, count // 3)
        first = fold * third
        is_test = known & (speakers >= first) & (speakers < first + third)
    else:
        is_test = (labels >= 0) & (takes < 5)
    split = np.full(len(recordings), TRAIN, np.uint8)
    split[known & (takes % 10 == 5)] = HELD_OUT
    split[is_test] = TEST
    recordings.split = split
    trained = labels[split == TRAIN]
    missing = [name for c, name in enumerate(recordings.classes) if c not in trained]
    if missing:
        raise UserError(
            f"--data: no recording to learn from in the class {list_names(missing)}; "
            f"give more recordings of each class, or another --test"
        )


def number_takes(labels, speakers):
    """The number of each recording among those of its speaker and class: (N,), from 0.

    >>> number_takes(np.array([0, 0, 1, 0]), np.array([0, 0, 0, 1])).tolist()
    [0, 1, 0, 0]
    """
    counts, takes = {}, []
    for pair in zip(labels.tolist(), speakers.tolist()):
        takes.append(counts.get(pair, 0))
        counts[pair] = takes[-1] + 1
    return np.array(takes)


# ---------------------------------------------------------------- your own recordings

def own_recordings(folder):
    """The Recordings of a folder of .wav files. Where the label and the speaker stand:

        folder/LABEL_SPEAKER_ANYTHING.wav          folder/LABEL/SPEAKER_ANYTHING.wav

    A name without _ has no label in the first form, and no speaker in the second. A folder
    that holds nothing but one other folder stands for that one.
    """
    if not folder.is_dir():
        raise UserError(f"--data {folder}: expected words, or a folder of .wav files")
    paths = find_wav_files(folder)
    if not paths:
        raise UserError(f"--data {folder}: found no .wav files; give a folder that holds some")
    while len(paths) > 1 and len({first_part(path, folder) for path in paths}) == 1:
        folder = folder / first_part(paths[0], folder)

    waves, label_names, speaker_names, cut = [], [], [], 0
    for n, path in enumerate(paths):
        if n % 500 == 0:
            progress(f"recordings: {n:,} of {len(paths):,}")
        samples = read_wav(path)
        cut += len(samples) > LONGEST * RATE
        waves.append(normalize(samples[:LONGEST * RATE]))
        label, speaker = names_of(path.relative_to(folder))
        label_names.append(label)
        speaker_names.append(speaker)
    classes = sorted(set(label_names) - {None})
    speakers = sorted(set(speaker_names) - {None})
    made = Recordings(
        waves, numbers_of(label_names, classes), classes,
        numbers_of(speaker_names, speakers), speakers,
    )
    if cut:
        made.notes.append(f"{cut:,} recordings are cut off after {LONGEST} seconds")
    unlabelled = int((made.labels < 0).sum())
    if unlabelled:
        made.notes.append(f"{unlabelled:,} recordings have no label: they are for training")
    return made


def find_wav_files(folder):
    """All .wav files below the folder, with numbers in their names in the order of numbers."""
    def key(path):
        parts = re.split(r"(\d+)", str(path.relative_to(folder)))
        return [(part.isdigit(), int(part) if part.isdigit() else part) for part in parts]

    paths = [path for path in folder.rglob("*") if path.suffix.lower() == ".wav"]
    return sorted(paths, key=key)


def first_part(path, folder):
    return path.relative_to(folder).parts[0]


def names_of(path):
    """(label, speaker) of a path inside the data folder, None for what it does not say.

    >>> names_of(Path("seven_anna_3.wav")), names_of(Path("seven/anna_3.wav"))
    (('seven', 'anna'), ('seven', 'anna'))
    >>> names_of(Path("noise.wav")), names_of(Path("seven_3.wav"))
    ((None, None), ('seven', None))
    >>> names_of(Path("seven/noise.wav")), names_of(Path("seven/3_1.wav"))
    (('seven', None), ('seven', '3'))
    """
    parts = path.stem.split("_")
    if len(path.parts) > 1:
        return path.parts[0], parts[0] if len(parts) > 1 else None
    label = parts[0] if len(parts) > 1 else None
    has_speaker = len(parts) > 2 or (len(parts) == 2 and not parts[1].isdigit())
    return label, parts[1] if has_speaker else None


def numbers_of(names, known):
    """The place of each name in the list `known`, -1 for None: (N,) int64."""
    number = {name: n for n, name in enumerate(known)}
    return np.array([number.get(name, -1) for name in names], np.int64)


def read_wav(path):
    """The samples of a .wav file, averaged over its channels, with 8,000 a second: float64.

    It must hold 8 or 16 bits PCM, with one or two channels. Raises UserError otherwise.
    """
    try:
        with wave.open(str(path), "rb") as file:
            channels, width = file.getnchannels(), file.getsampwidth()
            rate, content = file.getframerate(), file.readframes(file.getnframes())
    except (wave.Error, EOFError, OSError) as error:
        reason = str(error) or "it ends too early"
        raise UserError(
            f"{path}: cannot be read as a .wav file ({reason}); save it as 16-bit PCM"
        ) from None
    if width not in (1, 2) or channels not in (1, 2):
        raise UserError(
            f"{path}: found {8 * width} bits and {channels} channels; expected PCM of 8 or 16 "
            f"bits with 1 or 2 channels: convert it"
        )
    dtype = np.dtype("u1" if width == 1 else "<i2")
    whole = len(content) // (width * channels) * width * channels
    samples = np.frombuffer(content[:whole], dtype).reshape(-1, channels).mean(1)
    if width == 1:
        samples = samples - 128                  # 8 bits have no sign
    if len(samples) < SHORTEST * rate:
        raise UserError(
            f"{path}: holds {len(samples) / rate:.3f} seconds; give recordings of at least "
            f"{SHORTEST} seconds, or remove it"
        )
    return resample(samples, rate)


def resample(samples, rate):
    """The samples at 8,000 a second, by dropping or adding high frequencies: (n,) float64."""
    n = round(len(samples) * RATE / rate)
    if n == len(samples):
        return samples
    spectrum = np.fft.rfft(samples)[:n // 2 + 1]
    return np.fft.irfft(spectrum, n) * (n / len(samples))


# ---------------------------------------------------------------- synthetic words

# Ten words, all of them the same six sounds in another order. So the mean spectrum says
# little about the word.
WORDS = (
    "sakimu", "samuki", "kisamu", "kimusa", "musaki", "mukisa", "sukami", "kasumi", "misuka",
    "makusi",
)

# Sound: duration in ms, three formants in Hz (None: those of its neighbours), and how loud
# the voice, the hiss and the burst are. Two lines of k: the closed mouth, then the burst.
SOUNDS = {
    "a": [(120, (750, 1250, 2500), 1.0, 0, 0)],
    "i": [(100, (300, 2250, 2950), 0.8, 0, 0)],
    "u": [(100, (330, 850, 2300), 0.8, 0, 0)],
    "m": [(80, (250, 1100, 2100), 0.35, 0, 0)],
    "s": [(110, None, 0, 0.5, 0)],
    "k": [(50, None, 0, 0, 0), (30, None, 0, 0, 0.8)],
}
HISS, BURST = (3300, 500), (1700, 600)           # centre and width in Hz
STEP = 40                                        # samples between two values of a track


def synthetic_words(takes, speakers=12, seed=0):
    """Recordings of the ten words by artificial voices, `takes` of each word and voice."""
    waves, labels, spoken_by = [], [], []
    for speaker in range(speakers):
        progress(f"words: voice {speaker + 1} of {speakers}")
        voice = make_voice(np.random.default_rng([seed, speaker]))
        for label, word in enumerate(WORDS):
            for take in range(takes):
                draws = np.random.default_rng([seed, speaker, label, take])
                waves.append(normalize(speak(word, voice, draws)))
                labels.append(label)
                spoken_by.append(speaker)
    names = [f"voice {speaker}" for speaker in range(speakers)]
    return Recordings(waves, np.array(labels), list(WORDS), np.array(spoken_by), names)


def make_voice(draws):
    """What distinguishes a speaker: a dict."""
    return dict(
        pitch=np.exp(draws.uniform(np.log(85), np.log(230))),        # in Hz
        tract=np.exp(draws.uniform(-0.18, 0.18)),        # all formants times this
        accent={sound: np.exp(draws.normal(0, 0.05, 3)) for sound in SOUNDS},
        tilt=draws.uniform(0.4, 1.2),            # how fast the overtones get weaker
        breath=draws.uniform(0, 0.1),
        pace=np.exp(draws.uniform(-0.15, 0.15)),
    )


def speak(word, voice, draws):
    """One recording of a word, (n,) float64, with another pitch, pace and background each time.

    The voice is a sum of overtones, each as loud as the formants make it. (The formants are
    taken at the voice's usual pitch, so they move a little with the pitch of a take.) Hiss and
    burst are noise of a narrow band.
    """
    formants, voiced, hiss, burst = make_tracks(word, voice, draws)
    n = len(voiced) * STEP
    places = np.arange(n) / STEP

    def per_sample(track):
        return np.interp(places, np.arange(len(track)), track)

    bend = draws.normal(0, 0.12, 2)
    pitch = voice["pitch"] * np.exp(draws.normal(0, 0.1) + np.linspace(*bend, n))
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    wave = np.zeros(n)
    for overtone in range(1, int(RATE / 2 / pitch.max()) + 1):
        frequency = overtone * voice["pitch"]
        loudness = voiced * overtone**-voice["tilt"] * resonance(frequency, formants)
        wave += per_sample(loudness) * np.cos(overtone * phase)
    wave += per_sample(voiced) * voice["breath"] * draws.normal(size=n)
    wave += per_sample(hiss) * band_noise(*HISS, voice["tract"], n, draws)
    wave += per_sample(burst) * band_noise(*BURST, voice["tract"], n, draws)
    before, after = draws.integers(RATE // 50, RATE // 4, 2)         # 20 to 250 ms of silence
    wave = np.pad(wave, (before, after))
    decibels = draws.uniform(8, 30)
    colour = draws.uniform(200, 3000)
    background = band_noise(0, colour, 1, len(wave), draws)
    return wave + background * wave.std() * 10**(-decibels / 20)


def make_tracks(word, voice, draws):
    """How the voice moves: formants (3, T) in Hz, and the loudness (T,) of the three sources."""
    pace = voice["pace"] * np.exp(draws.uniform(-0.25, 0.25))
    columns = []
    for sound in word:
        stretch = pace * np.exp(draws.normal(0, 0.3))
        for milliseconds, formants, *loudness in SOUNDS[sound]:
            count = max(2, round(milliseconds * stretch * RATE / 1000 / STEP))
            if formants is None:
                formants = (np.nan,) * 3
            formants = np.array(formants) * voice["tract"] * voice["accent"][sound]
            columns += [np.concatenate([formants, loudness])] * count
    tracks = np.array(columns).T                                          # (6, T)
    for track in tracks[:3]:                     # sounds without formants lie in between
        known = np.flatnonzero(~np.isnan(track))
        track[:] = np.interp(np.arange(len(track)), known, track[known])
    tracks[:3] = smooth(tracks[:3], 9)           # the tongue needs time
    tracks[3:] = smooth(tracks[3:], 3)
    return tracks[:3], *tracks[3:]


def smooth(tracks, width):
    """Each row averaged over `width` steps, an odd number."""
    half = width // 2
    padded = np.pad(tracks, ((0, 0), (half, half)), mode="edge")
    return np.lib.stride_tricks.sliding_window_view(padded, width, axis=1).mean(-1)


def resonance(frequency, formants):
    """How much three formants (3, T) amplify a frequency: (T,)."""
    widths = np.array([80, 110, 160])[:, None]
    strength = np.array([1, 0.6, 0.35])[:, None]
    return (strength / (1 + ((frequency - formants) / widths)**2)).sum(0) + 0.005


def band_noise(centre, width, scale, n, draws):
    """(n,) noise of standard deviation 1 around a frequency in Hz."""
    spectrum = np.fft.rfft(draws.normal(size=n))
    frequency = np.fft.rfftfreq(n, 1 / RATE)
    spectrum *= np.exp(-0.5 * ((frequency - centre * scale) / width)**2)
    noise = np.fft.irfft(spectrum, n)
    return noise / noise.std()


# ---------------------------------------------------------------- batches

class WaveBatches:
    """The batches of a training: recordings of similar length, distorted anew each time.

    Of a recording longer than a second (CROP), each step takes a random second. The features of
    the tables are made of whole recordings.

    Arguments: recordings; indices (n,) of those to learn from; size, of a batch; speed, the
    largest change of the speed as a natural logarithm; seed.
    """

    def __init__(self, recordings, indices, size, speed, seed):
        self.waves, self.indices = recordings.waves, np.asarray(indices)
        if len(indices) < size:
            raise UserError(
                f"--batch-size {size}: there are only {len(indices):,} recordings to learn "
                f"from; give more recordings, or a smaller --batch-size"
            )
        self.size, self.speed, self.seed = size, speed, seed
        self.lengths = np.array([len(self.waves[i]) for i in indices])
        self.epoch = None

    def __call__(self, step):
        """-> waves (B, S) float32, zeros behind the end; their frames (B,) int64."""
        waves, lengths, _, _ = self.two_views(step)
        return waves, lengths

    def two_views(self, step):
        """Each recording twice, as two voices might say it.

        Returns waves (B, S) with their numbers of frames (B,); target_waves (B, S'); and
        target_frames (B, T), which say for each frame of `waves` which frame of `target_waves`
        is at the same moment of the recording.
        """
        draws = generator(self.seed, "distort", step)
        views, target_views, ratios = [], [], []
        for i in self.indices_of(step):
            size = min(len(self.waves[i]), CROP)
            begin = int(torch.rand(1, generator=draws) * (len(self.waves[i]) - size + 1))
            part = self.waves[i][begin:begin + size]
            numbers = torch.rand(2, generator=draws).numpy()
            speeds = np.exp(self.speed * (2 * numbers - 1))
            views.append(distort(part, speeds[0], draws))
            target_views.append(distort(part, speeds[1], draws))
            ratios.append(speeds[0] / speeds[1])
        waves, lengths = pad(views)
        target_waves, target_lengths = pad(target_views)
        ratios = torch.tensor(ratios, dtype=torch.float32)                # (B,)
        middle = torch.arange(int(lengths.max())) + FRAME / HOP / 2       # of a frame, in frames
        frames = middle * ratios[:, None] - FRAME / HOP / 2               # (B, T)
        frames = frames.round().long().clamp(min=0)
        target_frames = torch.minimum(frames, target_lengths[:, None] - 1)
        return waves, lengths, target_waves, target_frames

    def indices_of(self, step):
        """Which recordings a step takes: (B,) int64."""
        count = len(self.indices) // self.size
        epoch, batch = divmod(step, count)
        if epoch != self.epoch:
            draws = generator(self.seed, "recordings", epoch)
            jitter = torch.randn(len(self.indices), generator=draws).numpy()
            self.order = np.argsort(self.lengths * np.exp(0.2 * jitter), kind="stable")
            self.turns = torch.randperm(count, generator=draws).tolist()
            self.epoch = epoch
        begin = self.turns[batch] * self.size
        return self.indices[self.order[begin:begin + self.size]]


def distort(samples, speed, draws):
    """The wave at another speed, perhaps with another tone, perhaps with a background.

    The speed also changes the pitch and the formants, so it makes another voice.
    """
    tone, background, loudness = torch.rand(3, generator=draws).tolist()
    points = np.arange(int(len(samples) / speed)) * speed
    samples = np.interp(points, np.arange(len(samples)), samples)
    if tone < 0.5:                               # louder or softer in six ranges of pitch
        spectrum = np.fft.rfft(samples)
        decibels = 6 * torch.randn(6, generator=draws).numpy()
        place = np.linspace(0, 5, len(spectrum))
        spectrum = spectrum * 10**(np.interp(place, np.arange(6), decibels) / 20)
        samples = np.fft.irfft(spectrum, len(samples))
    if background < 0.3:                         # noise, 5 to 25 dB below the voice
        noise = torch.randn(len(samples), generator=draws).numpy()
        samples = samples + noise * samples.std() * 10**(-(5 + 20 * loudness) / 20)
    return normalize(samples)


def draw_spans(lengths, span, share, draws):
    """Which frames are hidden: (B, T) bool, a share of each recording in whole spans.

    Of n frames, round(share · n / span) spans are hidden, but at least one. They do not
    overlap. lengths (B,) int64, in frames.
    """
    masked = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.bool)
    for row, n in zip(masked, lengths.tolist()):
        size = min(span, max(1, n // 2))                     # a short recording keeps one half
        count = min(max(1, round(share * n / size)), n // size)
        shrunk = n - count * (size - 1)                      # if a span were a single frame
        starts = torch.randperm(shrunk, generator=draws)[:count].sort().values
        starts = starts + torch.arange(count) * (size - 1)
        row[(starts[:, None] + torch.arange(size)).flatten()] = True
    return masked


def choose_distractors(codes, masked, numbers):
    """For each of M hidden frames, K others of the same recording with another code.

    codes (M, G), in the order of masked.nonzero(); masked (B, T); numbers (M, K) in [0, 1).
    Returns their rows among the M frames (M, K), and whether there are any (M,).
    """
    recording = masked.nonzero()[:, 0]                  # (M,)
    allowed = recording[:, None] == recording           # (M, M)
    allowed &= (codes[:, None] != codes).any(-1)
    count = allowed.cumsum(1)                           # so many are allowed up to each frame
    wanted = (numbers * count[:, -1:]).long() + 1       # which of them, counted from 1
    distractors = torch.searchsorted(count, wanted).clamp(max=len(codes) - 1)
    return distractors, count[:, -1] > 0


def pad(waves):
    """A list of B waves -> (B, S) float32, zeros behind the end; their frames (B,) int64."""
    longest = max(len(samples) for samples in waves)
    padded = torch.zeros(len(waves), longest)
    for row, samples in zip(padded, waves):
        row[:len(samples)] = torch.from_numpy(samples)
    return padded, torch.tensor([count_frames(len(samples)) for samples in waves])


def count_frames(samples):
    """How many frames the encoder makes of so many samples."""
    return (samples // HOP * HOP - FRAME) // HOP + 1


# ---------------------------------------------------------------- log-mel spectra

def log_mel(wave, bands=40):
    """The logarithm of the power in mel bands, a row for each frame: (T, bands) float32.

    Frames of 25 ms under a Hann window, every 10 ms; their power spectrum at 129
    frequencies; triangles on the mel scale, 2595 log10(1 + f/700).
    """
    width, points = 200, 256
    wave = np.pad(wave, (0, max(0, width - len(wave))))
    frames = np.lib.stride_tricks.sliding_window_view(wave, width)[::HOP]
    window = np.hanning(width + 1)[:width]
    power = np.abs(np.fft.rfft(frames * window, points))**2               # (T, 129)
    return np.log(power @ mel_triangles(bands, points) + 0.01).astype(np.float32)


def mel_waves(bands=40, width=2 * HOP):
    """Cosines, then sines, at `bands` pitches equally far apart in mel: (2 · bands, width).

    They are under a Hann window. The sum of the squares of a cosine's and a sine's product
    with a wave is the power around that pitch.
    """
    mels = 2595 * np.log10(1 + np.array([60, 3900]) / 700)
    pitches = 700 * (10**(np.linspace(*mels, bands) / 2595) - 1)          # in Hz
    angles = 2 * np.pi * pitches[:, None] * np.arange(width) / RATE
    waves = np.concatenate([np.cos(angles), np.sin(angles)]) * np.hanning(width + 1)[:width]
    # The squares of a row add up to 30. Divided by 6, its products with white noise of standard
    # deviation 1 have the standard deviation √30 / 6, which is nearly 1.
    return torch.tensor(waves / 6, dtype=torch.float32)


def mel_triangles(bands, points):
    """The weight of each frequency in each band: (points/2 + 1, bands).

    A triangle begins at the centre of the band below, and ends at the centre of the band
    above.
    """
    highest = 2595 * np.log10(1 + RATE / 2 / 700)
    mels = np.linspace(0, highest, bands + 2)
    corners = 700 * (10**(mels / 2595) - 1)                               # in Hz
    frequency = np.arange(points // 2 + 1)[:, None] * RATE / points
    below, centre, above = corners[:-2], corners[1:-1], corners[2:]
    rising = (frequency - below) / (centre - below)
    falling = (above - frequency) / (above - centre)
    return np.minimum(rising, falling).clip(min=0)
