package feed

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// life is one process of an edge.
type life struct {
	*harness
	partial *partial
	answer  *resealv1.SyncRequest
}

// live starts a process whose control plane sends a configuration, and lets it live
// for a time. It does not end it.
func live(t *testing.T, state *memory, update *resealv1.Update, d time.Duration, options ...func(*Config)) *life {
	t.Helper()
	l := &life{partial: &partial{}}
	l.harness = run(t, state, func(stream syncStream, _ *resealv1.Hello) error {
		if update == nil {
			return errors.New("no control plane")
		}
		answers, err := send(stream, update)
		if err == nil {
			l.answer = answers[0]
		}
		return hold(stream)
	}, append([]func(*Config){partly(l.partial)}, options...)...)
	settle(d)
	return l
}

// A configuration that ended two processes is not applied by the third, which goes
// back to what served well before and says so.
func TestCrashLoopEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		good, bad := full(1, encoded(t, "a", "good")), full(2, encoded(t, "a", "crashes"))
		first := live(t, &memory{}, good, 2*trialTime)
		first.stop()
		state := first.state
		for range maxCrashes {
			l := live(t, state, bad, trialTime/2)
			if l.partial.at("a") != "crashes" {
				t.Fatalf("serving %s", l.partial.at("a"))
			}
			state = l.state.crashed()
			l.stop()
		}
		// Without the control plane: what is kept as the last is passed over.
		alone := live(t, state.crashed(), nil, 0)
		if err := alone.ApplyLastGood(t.Context()); err != nil || alone.partial.at("a") != "good" {
			t.Errorf("%v, serving %s", err, alone.partial.at("a"))
		}
		alone.stop()
		// And with it.
		l := live(t, state, bad, 0)
		nack := l.answer.GetNack()
		if nack.GetPartly() || len(nack.GetViolations()) != 1 || !strings.Contains(nack.GetViolations()[0].Text(), "2 times this edge's process ended within 2m0s") {
			t.Fatalf("answered %v", l.answer)
		}
		if err := l.ApplyLastGood(t.Context()); err != nil || l.partial.at("a") != "good" {
			t.Errorf("%v, serving %s", err, l.partial.at("a"))
		}
		settle(10 * retryInterval)
		if l.partial.at("a") != "good" {
			t.Errorf("it is applied after all: serving %s", l.partial.at("a"))
		}
		state = l.state.crashed()
		l.stop()
		// A mended one is applied at once.
		mended := live(t, state.crashed(), full(3, encoded(t, "a", "mended")), 0)
		if mended.answer.GetAck().GetRevision() != 3 {
			t.Errorf("answered %v", mended.answer)
		}
		mended.stop()
		// And so is the same by another version of the edge.
		newer := live(t, state, bad, 0, func(c *Config) { c.Version = "v2" })
		if newer.answer.GetAck().GetRevision() != 2 {
			t.Errorf("answered %v", newer.answer)
		}
	})
}

// crash lives for d with a configuration and then dies.
func crash(t *testing.T, state *memory, update *resealv1.Update, d time.Duration) *memory {
	t.Helper()
	l := live(t, state, update, d)
	if l.answer.GetAck().GetRevision() != update.GetRevision() {
		t.Fatalf("answered %v", l.answer)
	}
	state = l.state.crashed()
	l.stop()
	return state
}

// said is what the newest Hello says of crashes.
func (l *life) said() []*resealv1.CrashedConfiguration {
	hellos, _ := l.server.seen()
	return hellos[len(hellos)-1].GetCrashed()
}

// A crash that comes more than a minute after a configuration was taken counts, and
// each start tells the control plane what it knows. The third serves what served
// well before, without waiting for anybody.
func TestCrashAMinuteLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		good, bad := full(1, encoded(t, "a", "good")), full(2, encoded(t, "a", "crashes later"))
		first := live(t, &memory{}, good, trialTime+2*time.Second)
		if len(first.said()) != 0 {
			t.Errorf("said %v", first.said())
		}
		first.stop()
		state := crash(t, first.state, bad, 70*time.Second)
		second := live(t, state, bad, 100*time.Second)
		if said := second.said(); len(said) != 1 || said[0].GetCrashes() != 1 || said[0].GetGivenUp() || said[0].GetRevision() != 2 || !bytes.Equal(said[0].GetHash(), bad.GetHash()) {
			t.Errorf("said %v", said)
		}
		state = second.state.crashed()
		second.stop()
		third := live(t, state, bad, 0)
		defer third.stop()
		if said := third.said(); len(said) != 1 || said[0].GetCrashes() != 2 || !said[0].GetGivenUp() {
			t.Errorf("said %v", said)
		}
		if third.answer.GetNack().GetServingRevision() != 1 || third.partial.at("a") != "good" {
			t.Errorf("answered %v, serving %s", third.answer, third.partial.at("a"))
		}
		if text := third.answer.GetNack().GetViolations()[0].Text(); !strings.Contains(text, fmt.Sprintf("%.6x", bad.GetHash())) {
			t.Errorf("refused by %q", text)
		}
	})
}

// An operator who knows better rolls back and applies again: the configuration gets
// one more process, and is proven or given up by that.
func TestSentOnceMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		good, suspect := full(1, encoded(t, "a", "good")), full(2, encoded(t, "a", "killed by hand"))
		undone, again := full(3, encoded(t, "a", "good")), full(4, encoded(t, "a", "killed by hand"))
		first := live(t, &memory{}, good, trialTime+2*time.Second)
		first.stop()
		state := first.state
		for range maxCrashes {
			state = crash(t, state, suspect, time.Second)
		}
		onceMore := func(d time.Duration) *life {
			l := &life{partial: &partial{}}
			l.harness = run(t, state, func(stream syncStream, _ *resealv1.Hello) error {
				answers, err := send(stream, suspect, undone, again)
				if err == nil && (answers[0].GetNack() == nil || answers[1].GetAck() == nil || answers[2].GetAck().GetRevision() != 4) {
					t.Errorf("answered %v", answers)
				}
				return hold(stream)
			}, partly(l.partial))
			settle(d)
			return l
		}
		l := onceMore(time.Second)
		state = l.state.crashed()
		l.stop()
		if l := live(t, state.crashed(), again, 0); l.answer.GetNack() == nil || l.partial.at("a") != "good" {
			t.Errorf("answered %v", l.answer)
		}
		l = onceMore(trialTime + 2*time.Second)
		state = l.state.crashed()
		l.stop()
		for range 3 * maxCrashes { // proven
			state = crash(t, state, again, time.Second)
		}
	})
}

// A configuration that served for a while is better than one that ends the process,
// if none has proved itself.
func TestSoundIsBetterThanNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		state := &memory{}
		l := &life{partial: &partial{}}
		sound, bad := full(1, encoded(t, "a", "sound")), full(2, encoded(t, "a", "crashes"))
		l.harness = run(t, state, func(stream syncStream, _ *resealv1.Hello) error {
			_, err := send(stream, sound)
			time.Sleep(soundTime + time.Second)
			if err == nil {
				_, err = send(stream, bad)
			}
			return errors.Join(err, hold(stream))
		}, partly(l.partial))
		settle(soundTime + 2*time.Second)
		state = l.state.crashed()
		l.stop()
		state = crash(t, state, bad, 0)
		last := live(t, state, bad, 0)
		if last.answer.GetNack() == nil || last.partial.at("a") != "sound" {
			t.Errorf("answered %v, serving %s", last.answer, last.partial.at("a"))
		}
	})
}

// Neither an end in order nor a crash of what has proved itself counts.
func TestOrderlyEndsDontCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		state, one := &memory{}, full(1, encoded(t, "a", "a:1"))
		for range 3 * maxCrashes {
			l := live(t, state, one, time.Second)
			if l.answer.GetAck() == nil {
				t.Fatalf("answered %v", l.answer)
			}
			l.stop()
			state = l.state.crashed()
		}
		l := live(t, state, one, 2*trialTime)
		state = l.state.crashed()
		l.stop()
		for range 3 * maxCrashes {
			l := live(t, state, one, time.Second)
			if l.answer.GetAck() == nil {
				t.Fatalf("answered %v", l.answer)
			}
			state = l.state.crashed()
			l.stop()
		}
	})
}

// A configuration that gave way to another in time is not to blame for what
// happens then.
func TestReplacedConfigurationIsNotCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		state := &memory{}
		one, two := full(1, encoded(t, "a", "a:1")), full(2, encoded(t, "a", "a:2"))
		for range maxCrashes {
			l := &life{partial: &partial{}}
			l.harness = run(t, state, func(stream syncStream, _ *resealv1.Hello) error {
				if _, err := send(stream, one, two); err != nil {
					t.Error(err)
				}
				return hold(stream)
			}, partly(l.partial))
			settle(time.Second)
			state = l.state.crashed()
			l.stop()
		}
		if l := live(t, state.crashed(), one, 0); l.answer.GetAck().GetRevision() != 1 {
			t.Errorf("answered %v", l.answer)
		}
		if l := live(t, state, two, 0); l.answer.GetNack().GetRevision() != 2 {
			t.Errorf("answered %v", l.answer)
		}
	})
}

// When there is nothing else, what crashed is better than nothing.
func TestNothingElseToServe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		state, one := &memory{}, full(1, encoded(t, "a", "a:1"))
		for range maxCrashes {
			l := live(t, state, one, 0)
			state = l.state.crashed()
			l.stop()
		}
		kept := live(t, state.crashed(), nil, 0)
		if err := kept.ApplyLastGood(t.Context()); err != nil || kept.partial.at("a") != "a:1" {
			t.Errorf("%v, serving %s", err, kept.partial.at("a"))
		}
		kept.stop()
		delete(state.files, lastGoodName) // it crashed before it was kept
		l := live(t, state, one, 0)
		if l.answer.GetNack() == nil || l.partial.at("a") != "nowhere" {
			t.Errorf("answered %v", l.answer)
		}
		if err := l.ApplyLastGood(t.Context()); l.partial.at("a") != "a:1" {
			t.Errorf("%v, serving %s", err, l.partial.at("a"))
		}
		if l.Revision() != 1 {
			t.Errorf("revision %d", l.Revision())
		}
	})
}

// A trial file that can't be read or written does not keep an edge from serving.
func TestTrialFileIsDamaged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		state := &memory{files: map[string][]byte{trialName: []byte("junk")}}
		if l := live(t, state, full(1, encoded(t, "a", "a:1")), 2*trialTime); l.answer.GetAck() == nil {
			t.Errorf("answered %v", l.answer)
		}
	})
}
