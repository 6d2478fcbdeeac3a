package loop

import (
	"math/bits"
	"time"
)

const (
	// tick is the wheel's resolution: a timer fires up to two ticks late, and
	// never early.
	tick = 10 * time.Millisecond

	levelBits = 6
	slots     = 1 << levelBits
	slotMask  = slots - 1
	levels    = 4 // 64 ticks, 41 s, 44 min, 46 h; what is due later is looked at again then

	// longest is what a timer is set to at most: a century, which leaves room for the
	// loop's time to be added.
	longest = 100 * 365 * 24 * time.Hour
)

// Timer calls a function on its loop, once per Set. It is made by Loop.Timer or
// Conn.Timer, is used on its loop alone, and holds no memory but its own.
//
// To set a timer later than it is set costs a store, so one that is put off with
// each message, as for an idle time, costs next to nothing.
type Timer struct {
	loop  *Loop
	conn  *Conn // whose panics those of call are; or nil
	call  func()
	due   int64 // tick
	at    int64 // tick at which its slot is looked at: not after due
	level uint8
	slot  uint8
	armed bool

	next, prev *Timer
}

// Timer makes a timer that calls f. A panic in f is reported and ends nothing.
func (l *Loop) Timer(f func()) *Timer { return &Timer{loop: l, call: f} }

// Timer makes a timer that calls f. It is stopped when the connection ends or
// moves, and can't be set after that. A panic in f ends the connection.
func (c *Conn) Timer(f func()) *Timer {
	t := &Timer{loop: c.loop, conn: c, call: f}
	c.timers = append(c.timers, t)
	return t
}

// Set has the timer fire after d, in place of what was set before. The resolution
// is 10 ms; more than a century is as a century.
func (t *Timer) Set(d time.Duration) {
	if t.conn != nil && t.conn.told {
		return
	}
	w := &t.loop.wheel
	// The time of the round is a little behind, hence the further tick.
	t.due = int64((t.loop.now+min(max(d, 0), longest)+tick-1)/tick) + 1
	if t.armed && t.due >= t.at {
		return // looked at again when its slot is due
	}
	if t.armed {
		w.remove(t)
	}
	w.insert(t)
}

// Stop keeps the timer from firing.
func (t *Timer) Stop() {
	if t.armed {
		t.loop.wheel.remove(t)
	}
}

// Pending reports whether the timer is set and has not fired.
func (t *Timer) Pending() bool { return t.armed }

// wheel is a hierarchical timing wheel (Varghese and Lauck, 1987): a timer hangs
// in the level whose slots are just fine enough for the time it has left, and
// comes down a level when its slot is due.
type wheel struct {
	now      int64 // the last tick that was dealt with
	slots    [levels][slots]*Timer
	occupied [levels]uint64
}

func (w *wheel) insert(t *Timer) {
	left := max(t.due-w.now, 0)
	level := 0
	for level < levels-1 && left >= 1<<(levelBits*(level+1)) {
		level++
	}
	t.at = w.now + min(left, 1<<(levelBits*levels)-1)
	at := t.at >> (levelBits * level)
	t.at = at << (levelBits * level)
	t.level, t.slot, t.armed = uint8(level), uint8(at&slotMask), true
	head := &w.slots[t.level][t.slot]
	t.prev, t.next = nil, *head
	if t.next != nil {
		t.next.prev = t
	}
	*head = t
	w.occupied[t.level] |= 1 << t.slot
}

func (w *wheel) remove(t *Timer) {
	if t.next != nil {
		t.next.prev = t.prev
	}
	if t.prev != nil {
		t.prev.next = t.next
	} else {
		w.slots[t.level][t.slot] = t.next
		if t.next == nil {
			w.occupied[t.level] &^= 1 << t.slot
		}
	}
	t.next, t.prev, t.armed = nil, nil, false
}

// next is the tick at which something must be done, if there is anything.
func (w *wheel) next() (at int64, ok bool) {
	for level := range levels {
		if w.occupied[level] == 0 {
			continue
		}
		here := w.now >> (levelBits * level)
		// From the slot after this one, all around to this one.
		ahead := bits.RotateLeft64(w.occupied[level], -int((here+1)&slotMask))
		due := (here + 1 + int64(bits.TrailingZeros64(ahead))) << (levelBits * level)
		if !ok || due < at {
			at, ok = due, true
		}
	}
	return at, ok
}

// advance fires what is due up to a tick.
func (w *wheel) advance(to int64, fire func(*Timer)) {
	for {
		at, ok := w.next()
		if !ok || at > to {
			w.now = max(w.now, to)
			return
		}
		w.now = at
		for level := levels - 1; level > 0; level-- {
			if at&(1<<(levelBits*level)-1) == 0 {
				w.empty(level, int(at>>(levelBits*level))&slotMask, func(t *Timer) { w.insert(t) })
			}
		}
		w.empty(0, int(at)&slotMask, func(t *Timer) {
			if t.due > w.now {
				w.insert(t) // was put off
				return
			}
			fire(t)
		})
	}
}

// empty takes each timer out of a slot.
func (w *wheel) empty(level, slot int, each func(*Timer)) {
	for t := w.slots[level][slot]; t != nil; t = w.slots[level][slot] {
		w.remove(t)
		each(t)
	}
}
