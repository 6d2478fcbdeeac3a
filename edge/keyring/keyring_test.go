package keyring

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// heldNow is what the control plane was told last, as text.
func (e *edge) heldNow() string {
	var texts []string
	for _, held := range e.server.last().GetKeyrings() {
		texts = append(texts, fmt.Sprint(held.GetName(), held.GetEpochs(), " active ", held.GetActive()))
	}
	return strings.Join(texts, "; ")
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func TestHold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		now := time.Now()
		r, other := newRotation("default"), newRotation("other")
		server := newControlPlane(r.keyring(r.epoch(1, active, now), r.epoch(2, prepared, now)))
		e := start(t, server, &disk{})
		settle(time.Second)
		if !closed(e.Ready()) || !closed(e.Synced()) || !e.Connected() {
			t.Error("not ready after the first response")
		}
		if first := server.requests[0]; first.GetEdge() != "e1" || first.GetLabels()["site"] != "a" || first.GetSerial() != 0 || len(first.GetKeyrings()) != 0 {
			t.Errorf("first request %v", first)
		}
		if got := e.heldNow(); got != "default[1 2] active 1" || server.last().GetSerial() != 1 || server.last().GetEdge() != "" {
			t.Errorf("acked %q, %v", got, server.last())
		}
		p := e.Keys("default", "main", "policy")
		one := mustWrap(t, p, "one", "")

		server.say(r.keyring(r.epoch(1, retired, now), r.epoch(2, active, now)), other.keyring(other.epoch(1, active, now)))
		settle(time.Second)
		if got := e.heldNow(); got != "default[1 2] active 2; other[1] active 1" || server.last().GetSerial() != 2 {
			t.Errorf("acked %q, serial %d", got, server.last().GetSerial())
		}
		two := mustWrap(t, p, "two", "")
		if one[7] != 1 || two[7] != 2 {
			t.Errorf("encrypted with %d, then %d", one[7], two[7])
		}
		expect(t, p, one, "", "one", good)
		expect(t, p, two, "", "two", good)

		// What is no longer named is erased at once: a keyring and an epoch.
		before := e.epoch(1)
		server.say(r.keyring(r.epoch(2, active, now)))
		settle(time.Second)
		expect(t, p, one, "", "", keyRetired)
		expect(t, p, two, "", "two", good)
		if !e.zeroed(before) {
			t.Error("the secret of an erased epoch is still in memory")
		}
		if got := e.heldNow(); got != "default[2] active 2" || e.Keys("other", "main", "policy").Issuing() {
			t.Errorf("acked %q", got)
		}
		if n := e.logs.count("level=WARN") + e.logs.count("level=ERROR"); n != 0 {
			t.Errorf("%d complaints in the log:\n%s", n, &e.logs.text)
		}
	})
}

// TestMalformed: what breaks the contract changes nothing and is not acked.
func TestMalformed(t *testing.T) {
	r := newRotation("default")
	now := time.Now()
	fresh := func() *resealv1.EpochSecret { return r.epoch(1, active, now) }
	changed := func(change func(*resealv1.EpochSecret)) []*resealv1.KeyringSecrets {
		e := r.epoch(2, active, now)
		change(e)
		return []*resealv1.KeyringSecrets{r.keyring(fresh()), newRotation("z").keyring(e)}
	}
	tests := map[string][]*resealv1.KeyringSecrets{
		"no name":       {{}},
		"twice":         {r.keyring(fresh()), r.keyring(fresh())},
		"negative":      {{Name: "x", RetireAfter: durationpb.New(-1)}},
		"two active":    {r.keyring(fresh(), r.epoch(2, active, now))},
		"epoch twice":   {r.keyring(fresh(), r.epoch(1, retired, now))},
		"number 0":      changed(func(e *resealv1.EpochSecret) { e.Epoch.Number = 0 }),
		"no epoch":      changed(func(e *resealv1.EpochSecret) { e.Epoch = nil }),
		"no state":      changed(func(e *resealv1.EpochSecret) { e.Epoch.State = 0 }),
		"unknown state": changed(func(e *resealv1.EpochSecret) { e.Epoch.State = 9 }),
		"no secret":     changed(func(e *resealv1.EpochSecret) { e.Secret = nil }),
		"short secret":  changed(func(e *resealv1.EpochSecret) { e.Secret = e.Secret[1:] }),
		"empty secret":  changed(func(e *resealv1.EpochSecret) { clear(e.Secret) }),
		"nil":           {nil},
	}
	for name, said := range tests {
		t.Run(name, func(t *testing.T) {
			h := holding(t, r.keyring(fresh()))
			secrets := said[len(said)-1].GetEpochs()
			err := h.apply(&resealv1.HoldResponse{Keyrings: said}, true)
			if !errors.Is(err, errMalformed) {
				t.Fatalf("error %v", err)
			}
			if p := h.Keys("default", "main", "policy"); !p.Issuing() {
				t.Error("what was held is lost")
			}
			for _, e := range secrets {
				if plausible(e.GetSecret()) {
					t.Error("the message still holds secrets")
				}
			}
		})
	}
	t.Run("stream", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			server := newControlPlane(r.keyring(r.epoch(1, active, time.Now())))
			e := start(t, server, &disk{})
			settle(time.Second)
			server.say(&resealv1.KeyringSecrets{})
			settle(time.Second)
			if e.Connected() || !e.Keys("default", "main", "policy").Issuing() || e.logs.count("it has no name") == 0 || e.heldNow() != "default[1] active 1" {
				t.Errorf("connected %v, acked %q:\n%s", e.Connected(), e.heldNow(), &e.logs.text)
			}
			server.say(r.keyring(r.epoch(1, active, time.Now())))
			settle(20 * time.Second)
			if !e.Connected() {
				t.Error("not connected again")
			}
		})
	})
}

// replaying is a stream on which one response comes again and again.
type replaying struct {
	grpc.ClientStream
	said []*resealv1.KeyringSecrets
}

func (r replaying) Send(*resealv1.HoldRequest) error { return nil }

func (r replaying) Recv() (*resealv1.HoldResponse, error) {
	return proto.CloneOf(&resealv1.HoldResponse{Serial: 7, Keyrings: r.said}), nil
}

type replayingClient struct {
	resealv1.KeyringServiceClient
	stream replaying
}

func (c replayingClient) Hold(context.Context, ...grpc.CallOption) (grpc.BidiStreamingClient[resealv1.HoldRequest, resealv1.HoldResponse], error) {
	return c.stream, nil
}

func TestSerial(t *testing.T) {
	r := newRotation("default")
	h := holding(t)
	h.config.Client = replayingClient{stream: replaying{said: []*resealv1.KeyringSecrets{r.keyring(r.epoch(1, active, time.Now()))}}}
	err := h.hold(t.Context())
	if !errors.Is(err, errMalformed) || !strings.Contains(err.Error(), "serial 7 came after 7") || !h.Keys("", "main", "policy").Issuing() {
		t.Errorf("a response that came twice: %v", err)
	}
}

// TestOutage is the control plane's absence for longer than the keys may live.
func TestOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		r := newRotation("default")
		r.retire, r.maxAge = time.Hour, 2*time.Hour
		server := newControlPlane(r.keyring(
			r.epoch(1, retired, began.Add(-15*time.Minute)), r.epoch(2, active, began), r.epoch(3, prepared, began)))
		e := start(t, server, &disk{})
		settle(time.Minute)
		p := e.Keys("default", "main", "policy")
		ticket := mustWrap(t, p, "x", "")
		old := append([]byte{0, 0, 0, 0, 0, 0, 0, 1}, ticket[8:]...)
		newer := append([]byte{0, 0, 0, 0, 0, 0, 0, 9}, ticket[8:]...)
		server.leave()
		at := func(since time.Duration) { settle(time.Until(began.Add(since))) }

		// The retired one ends retireAfter after it was retired.
		first, second := e.epoch(1), e.epoch(2)
		at(45*time.Minute - time.Second)
		expect(t, p, old, "", "", damaged) // its key is there
		at(45 * time.Minute)
		expect(t, p, old, "", "", keyRetired)
		if e.epoch(1) != nil || !e.zeroed(first) {
			t.Error("an epoch lives on")
		}
		if kept := e.disk.kept(t)[0].GetEpochs(); len(kept) != 2 {
			t.Errorf("%d epochs on disk", len(kept))
		}

		// The active one stops encrypting at maxActiveAge, and ends retireAfter
		// later.
		at(2*time.Hour - time.Second)
		expect(t, p, newer, "", "", keyUnknown)
		if !p.Issuing() || e.logs.count("no tickets are issued any more") != 0 {
			t.Error("stopped too early")
		}
		at(2 * time.Hour)
		if _, ok := p.Wrap([]byte("x"), ""); ok || p.Issuing() {
			t.Error("issues on")
		}
		expect(t, p, ticket, "", "x", good)
		expect(t, p, newer, "", "", staleReason)
		at(3*time.Hour - time.Second)
		expect(t, p, ticket, "", "x", good)
		at(3 * time.Hour)
		expect(t, p, ticket, "", "", keyRetired)
		if !e.zeroed(second) || len(e.numbers("default")) != 0 {
			t.Error("the secret lives on")
		}
		if n := e.logs.count("no tickets are issued any more"); n != 1 || e.logs.count("tickets are issued again") != 0 {
			t.Errorf("logged %d times that tickets stopped", n)
		}
		if kept := e.disk.kept(t)[0].GetEpochs(); len(kept) != 0 {
			t.Errorf("%d epochs on disk", len(kept))
		}
		if server.asked < 100 {
			t.Errorf("asked for keys %d times in 3 hours", server.asked)
		}

		server.say(r.keyring(r.epoch(8, active, time.Now())))
		server.comeBack()
		settle(time.Minute)
		if !p.Issuing() || e.logs.count("tickets are issued again") != 1 || !e.Connected() {
			t.Errorf("issuing %v, connected %v", p.Issuing(), e.Connected())
		}
	})
}

// TestRotationStopped: with a control plane that no longer rotates, keys end too,
// but a little later: its word comes first.
func TestRotationStopped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		r := newRotation("default")
		ends := r.epoch(1, retired, began)
		ends.Epoch.EraseAt = timestamppb.New(began.Add(time.Hour)) // counts more than retireAfter
		e := start(t, newControlPlane(r.keyring(ends, r.epoch(2, active, began))), &disk{})
		at := func(since time.Duration) { settle(time.Until(began.Add(since))) }
		at(time.Hour + clockGrace - time.Second)
		if got := e.numbers("default"); !slices.Equal(got, []uint64{1, 2}) {
			t.Errorf("held %v", got)
		}
		at(time.Hour + clockGrace)
		if got := e.numbers("default"); !slices.Equal(got, []uint64{2}) || e.heldNow() != "default[2] active 2" {
			t.Errorf("held %v, acked %q", got, e.heldNow())
		}
		at(24 * time.Hour)
		if e.Keys("default", "main", "policy").Issuing() || !e.Connected() || e.heldNow() != "default[2] active 0" {
			t.Errorf("an epoch encrypts for longer than maxActiveAge, acked %q", e.heldNow())
		}
	})
}

func TestRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		r := newRotation("default")
		server := newControlPlane(r.keyring(r.epoch(1, retired, began), r.epoch(2, active, began), r.epoch(3, prepared, began)))
		kept := &disk{}
		e := start(t, server, kept)
		settle(time.Second)
		ticket := mustWrap(t, e.Keys("", "main", "policy"), "x", "")
		e.stop()
		server.leave()

		e = start(t, server, kept)
		settle(time.Second)
		if !closed(e.Ready()) || closed(e.Synced()) || e.Connected() {
			t.Error("kept keys make an edge ready, not synced")
		}
		p := e.Keys("", "main", "policy")
		expect(t, p, ticket, "", "x", good)
		if again := mustWrap(t, p, "x", ""); again[7] != 2 {
			t.Errorf("encrypts with %d", again[7])
		}
		if kept.writes != 1 {
			t.Errorf("the same keys are written %d times", kept.writes)
		}
		server.comeBack()
		settle(20 * time.Second)
		if first := server.requests[len(server.requests)-2]; first.GetSerial() != 0 || len(first.GetKeyrings()) != 1 || first.GetKeyrings()[0].GetActive() != 2 {
			t.Errorf("an edge with kept keys begins with %v", first)
		}
		e.stop()

		// What has expired while the edge was down is not restored.
		server.leave()
		settle(13 * time.Hour)
		e = start(t, server, kept)
		settle(time.Second)
		if got := e.numbers("default"); !slices.Equal(got, []uint64{2, 3}) {
			t.Errorf("held %v", got)
		}
		e.stop()
		if onDisk := kept.kept(t)[0].GetEpochs(); len(onDisk) != 2 {
			t.Errorf("%d epochs stay on disk", len(onDisk))
		}
		settle(25 * time.Hour)
		e = start(t, server, kept)
		settle(time.Second)
		if closed(e.Ready()) || len(e.numbers("default")) != 0 {
			t.Error("keys that have expired make an edge ready")
		}
		expect(t, e.Keys("", "main", "policy"), ticket, "", "", keyRetired)
	})
}

func TestDisk(t *testing.T) {
	r := newRotation("default")
	began := func(t *testing.T) *controlPlane { return newControlPlane(r.keyring(r.epoch(1, active, time.Now()))) }
	t.Run("off", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			kept := &disk{data: []byte("from before")}
			e := start(t, began(t), kept, func(c *Config) { c.KeepOnDisk = false })
			settle(time.Second)
			if e.heldNow() != "default[1] active 1" || kept.data != nil || kept.writes != 0 {
				t.Errorf("acked %q, on disk %q", e.heldNow(), kept.data)
			}
		})
	})
	for name, content := range map[string][]byte{"no message": {1}, "no keys": {0x12, 0}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				kept := &disk{data: content}
				e := start(t, began(t), kept)
				settle(time.Second)
				if e.logs.count("the kept ticket keys can't be used") != 1 || e.heldNow() != "default[1] active 1" || kept.writes != 1 {
					t.Errorf("acked %q, %d writes:\n%s", e.heldNow(), kept.writes, &e.logs.text)
				}
			})
		})
	}
	t.Run("full", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			kept := &disk{err: errors.New("no space left")}
			e := start(t, began(t), kept)
			settle(time.Second)
			if e.heldNow() != "default[1] active 1" || e.logs.count("no space left") != 1 {
				t.Errorf("acked %q:\n%s", e.heldNow(), &e.logs.text)
			}
			kept.mu.Lock()
			kept.err = nil
			kept.mu.Unlock()
			settle(rewriteInterval)
			if kept.writes != 1 {
				t.Error("not written later")
			}
		})
	})
	t.Run("hangs", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			server, kept := began(t), &disk{slow: time.Minute}
			e := start(t, server, kept)
			settle(keepWait)
			p := e.Keys("", "main", "policy")
			ticket := mustWrap(t, p, "x", "")
			// A key that is compromised does not wait for the disk.
			server.say(r.keyring(r.epoch(2, active, time.Now())))
			settle(time.Millisecond)
			expect(t, p, ticket, "", "", keyRetired)
			settle(keepWait)
			if e.heldNow() != "default[2] active 2" {
				t.Errorf("acked %q", e.heldNow())
			}
			e.stop()
			if kept.kept(t)[0].GetEpochs()[0].GetEpoch().GetNumber() != 2 {
				t.Error("a revoked key stays on disk")
			}
		})
	})
}

func TestMetrics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		now := time.Now()
		r := newRotation("default")
		e := start(t, newControlPlane(r.keyring(
			r.epoch(1, retired, now.Add(-3*time.Hour)), r.epoch(2, retired, now.Add(-2*time.Hour)), r.epoch(3, active, now.Add(-time.Hour)))), &disk{})
		settle(time.Minute)
		const want = `
# HELP reseal_keyring_connected 1 while the control plane's stream of ticket keys lives.
# TYPE reseal_keyring_connected gauge
reseal_keyring_connected 1
# HELP reseal_keyring_epoch_age_seconds Time since the newest epoch of a state entered it.
# TYPE reseal_keyring_epoch_age_seconds gauge
reseal_keyring_epoch_age_seconds{keyring="default",state="active"} 3660
reseal_keyring_epoch_age_seconds{keyring="default",state="retired"} 7260
# HELP reseal_keyring_epochs Epochs that this edge holds.
# TYPE reseal_keyring_epochs gauge
reseal_keyring_epochs{keyring="default",state="active"} 1
reseal_keyring_epochs{keyring="default",state="retired"} 2
# HELP reseal_keyring_stale 1 when no tickets are issued because no newer key has come for too long or none is active.
# TYPE reseal_keyring_stale gauge
reseal_keyring_stale{keyring="default"} 0
`
		if err := testutil.GatherAndCompare(e.registry, strings.NewReader(want)); err != nil {
			t.Error(err)
		}
		settle(23 * time.Hour)
		if err := testutil.GatherAndCompare(e.registry, strings.NewReader(strings.Replace(
			want[strings.Index(want, "# HELP reseal_keyring_stale"):], `} 0`, `} 1`, 1)), "reseal_keyring_stale"); err != nil {
			t.Error(err)
		}
		if problems, err := testutil.GatherAndLint(e.registry); err != nil || len(problems) > 0 {
			t.Errorf("%v %v", problems, err)
		}
	})
}

// TestAnyHistory rotates at random and compares with a model: a ticket opens
// exactly while its epoch is held.
func TestAnyHistory(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := newRotation("default")
		h := New(Config{Logger: slog.New(slog.DiscardHandler)})
		p := h.Keys("", "main", "policy")
		tickets := map[uint64][]byte{}
		secrets := map[uint64]*epoch{}
		newest := uint64(0)
		for range rapid.IntRange(1, 12).Draw(t, "steps") {
			held := map[uint64]resealv1.EpochState{}
			for range rapid.IntRange(0, 4).Draw(t, "epochs") {
				number := rapid.Uint64Range(1, 6).Draw(t, "number")
				held[number] = rapid.SampledFrom([]resealv1.EpochState{prepared, retired}).Draw(t, "state")
			}
			activeNumber := rapid.Uint64Range(0, 6).Draw(t, "active")
			if activeNumber > 0 {
				held[activeNumber] = active
			}
			var epochs []*resealv1.EpochSecret
			for _, number := range slices.Sorted(maps.Keys(held)) {
				epochs = append(epochs, r.epoch(number, held[number], time.Now()))
			}
			if err := h.apply(&resealv1.HoldResponse{Keyrings: []*resealv1.KeyringSecrets{r.keyring(epochs...)}}, true); err != nil {
				t.Fatal(err)
			}
			if len(held) > 0 {
				newest = slices.Max(slices.Collect(maps.Keys(held)))
			}
			if ticket, ok := p.Wrap([]byte{byte(activeNumber)}, ""); ok != (activeNumber > 0) {
				t.Fatalf("Wrap with active epoch %d: %v", activeNumber, ok)
			} else if ok {
				tickets[activeNumber] = ticket
			}
			for number, ticket := range tickets {
				_, there := held[number]
				state, _, miss := p.Unwrap(ticket, "")
				want := good
				switch {
				case there:
				case number <= newest:
					want = keyRetired
				case activeNumber == 0:
					want = staleReason
				default:
					want = keyUnknown
				}
				if miss != want || there && (len(state) != 1 || state[0] != byte(number)) {
					t.Fatalf("epoch %d of %v: %x %v, want %v", number, held, state, miss, want)
				}
			}
			for number, e := range secrets {
				if e.secret != [secretSize]byte{} {
					t.Fatalf("a former secret of epoch %d is in memory", number)
				}
			}
			secrets = maps.Clone(h.rings["default"].epochs)
			want := []*resealv1.HeldKeyring{{Name: "default", Epochs: slices.Sorted(maps.Keys(held)), Active: activeNumber}}
			if got := h.held(); got[0].GetActive() != activeNumber || !cmp.Equal(got[0].GetEpochs(), want[0].GetEpochs()) {
				t.Fatalf("held %v, want %v", got, want)
			}
		}
	})
}
