package loop

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"
)

// TestWheel plays random sets, stops and leaps of time against what each timer must
// do: fire once, not before it is due, and at the first look after it is.
func TestWheel(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	l := &Loop{}
	type state struct {
		timer *Timer
		due   time.Duration // 0: not set
	}
	states := make([]*state, 200)
	for i := range states {
		s := &state{}
		s.timer = l.Timer(func() {
			if s.due == 0 {
				t.Fatal("a timer fired that was not set")
			}
			if l.now < s.due {
				t.Fatalf("at %s a timer fired that is due at %s", l.now, s.due)
			}
			s.due = 0
		})
		states[i] = s
	}
	ranges := []time.Duration{0, 5 * time.Millisecond, time.Second, time.Minute, time.Hour, 100 * time.Hour}
	for range 20_000 {
		s := states[random.IntN(len(states))]
		switch random.IntN(4) {
		case 0, 1:
			d := time.Duration(random.Int64N(int64(ranges[random.IntN(len(ranges))]) + 1))
			s.timer.Set(d)
			s.due = l.now + max(d, 1)
		case 2:
			s.timer.Stop()
			s.due = 0
		case 3:
			leap := ranges[random.IntN(len(ranges)-1)]
			l.now += time.Duration(random.Int64N(int64(leap) + 1))
			l.wheel.advance(int64(l.now/tick), func(fired *Timer) { fired.call() })
			for _, s := range states {
				if s.due > 0 && l.now > s.due+2*tick {
					t.Fatalf("at %s a timer has not fired that was due at %s", l.now, s.due)
				}
				if s.timer.Pending() != (s.due > 0) {
					t.Fatalf("pending %t, due %s", s.timer.Pending(), s.due)
				}
			}
		}
		if at, ok := l.wheel.next(); ok {
			for _, s := range states {
				if s.due > 0 && s.timer.due < at {
					t.Fatalf("the next look is at tick %d, and a timer is due at %d", at, s.timer.due)
				}
			}
		}
	}
}

// TestTimerLongest: what stands for "never" is not due at once.
func TestTimerLongest(t *testing.T) {
	l := &Loop{now: time.Hour}
	timer := l.Timer(func() { t.Error("it fired") })
	timer.Set(math.MaxInt64)
	l.now += 1000 * time.Hour
	l.wheel.advance(int64(l.now/tick), func(t *Timer) { t.call() })
	if !timer.Pending() {
		t.Error("it is not set any more")
	}
}

// TestTimerPutOff: to put a timer off moves it in no list.
func TestTimerPutOff(t *testing.T) {
	l := &Loop{}
	fired := 0
	timer := l.Timer(func() { fired++ })
	timer.Set(time.Second)
	before := *timer
	timer.Set(2 * time.Second)
	if timer.at != before.at || timer.slot != before.slot || timer.due <= before.due {
		t.Error("a timer that was put off has moved")
	}
	for l.now < 1900*time.Millisecond {
		l.now += tick
		l.wheel.advance(int64(l.now/tick), func(t *Timer) { t.call() })
	}
	if fired != 0 {
		t.Error("it fired before it was due")
	}
	l.now += 200 * time.Millisecond
	l.wheel.advance(int64(l.now/tick), func(t *Timer) { t.call() })
	if fired != 1 {
		t.Errorf("it fired %d times", fired)
	}
}

func BenchmarkTimerPutOff(b *testing.B) {
	l := &Loop{}
	timer := l.Timer(func() {})
	for b.Loop() {
		timer.Set(time.Minute)
	}
}

func BenchmarkTimerSetStop(b *testing.B) {
	l := &Loop{}
	timer := l.Timer(func() {})
	for b.Loop() {
		timer.Set(time.Minute)
		timer.Stop()
	}
}
