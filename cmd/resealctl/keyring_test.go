package main

import (
	"context"
	"io"
	"strings"
	"testing"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestRevokeAsksOnATerminal(t *testing.T) {
	for answer, revoked := range map[string]bool{"y\n": true, "YES\n": true, "n\n": false, "\n": false, "": false, "maybe\n": false} {
		f := newFake(t)
		s := start(t, f, true, answer, "keyring", "revoke", "default", "--epoch", "7")
		want := 1
		if revoked {
			want = 0
		}
		s.ends(want)
		said := s.err.String()
		if i, j := strings.Index(said, "2h13m become useless"), strings.Index(said, "Revoke? [y/N] "); i < 0 || j < i {
			t.Errorf("answer %q: the question comes without the cost: %s", answer, said)
		}
		f.fakeKeyrings.mu.Lock()
		if gone := findEpoch(f.fakeKeyrings.status, 7) == nil; gone != revoked {
			t.Errorf("answer %q: epoch 7 revoked: %t", answer, gone)
		}
		f.fakeKeyrings.mu.Unlock()
	}
}

// TestRevokeInterrupted: Ctrl-C at the question revokes nothing.
func TestRevokeInterrupted(t *testing.T) {
	f := newFake(t)
	in, feed := io.Pipe()
	defer feed.Close()
	s := start(t, f, true, "", "keyring", "revoke", "default", "--all")
	s.ends(1) // an empty input is no
	done := make(chan error, 1)
	r := &revocation{app: &app{console: console{in: in, err: io.Discard, terminal: true}}}
	bounded, stop := context.WithCancel(t.Context())
	go func() { done <- r.confirm(bounded) }()
	stop()
	if err := <-done; err != errInterrupted {
		t.Errorf("got %v", err)
	}
	if findEpoch(f.fakeKeyrings.status, 7) == nil {
		t.Error("it was revoked")
	}
}

func TestRotateShowsProgress(t *testing.T) {
	f := newFake(t)
	s := start(t, f, true, "", "keyring", "rotate", "--wait")
	s.ends(0)
	if !strings.Contains(s.err.String(), "\repoch 8 is held by 2/2 edges") || s.out.String() != "keyring/default: epoch 8 is active\n" {
		t.Errorf("stdout %q, stderr %q", s.out, s.err)
	}
}

func TestRotationOutcomes(t *testing.T) {
	k := func(numbers ...uint64) *resealv1.KeyringStatus {
		status := &resealv1.KeyringStatus{Name: "default"}
		for _, number := range numbers {
			status.Epochs = append(status.Epochs, &resealv1.Epoch{Number: number, State: resealv1.EpochState_EPOCH_STATE_RETIRED})
		}
		return status
	}
	for name, test := range map[string]struct {
		status *resealv1.KeyringStatus
		done   bool
		failed string
	}{
		"not seen yet":     {k(6, 7), false, ""},
		"no epochs at all": {k(), false, ""},
		"replaced already": {k(7, 8, 9), true, ""},
		"revoked":          {k(7, 9), false, `epoch 8 of keyring "default" was revoked`},
	} {
		r := &rotation{app: &app{console: console{out: io.Discard, err: io.Discard}}, keyring: "default", epoch: 8}
		done, err := r.look(test.status)
		if done != test.done || (err == nil) != (test.failed == "") || err != nil && err.Error() != test.failed {
			t.Errorf("%s: %t, %v", name, done, err)
		}
	}
}

func TestExactAge(t *testing.T) {
	for want, d := range map[string]time.Duration{
		"1s": time.Millisecond, "59s": 59 * time.Second, "3m": 2*time.Minute + 1, "2h": 2 * time.Hour,
		"2h13m": 2*time.Hour + 12*time.Minute + time.Second, "10h10m": 10*time.Hour + 10*time.Minute, "26h": 26 * time.Hour,
	} {
		if got := exactAge(d); got != want {
			t.Errorf("%s is %q, want %q", d, got, want)
		}
	}
}
