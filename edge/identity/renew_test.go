package identity

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// run starts Run in fake time; the returned func ends it.
func run(t *testing.T, i *Identity) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- i.Run(ctx) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func TestRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		cfg := testConfig(t, p)
		i := newDirect(t, p, cfg)
		ensure(t, i)
		stop := run(t, i)
		for range 10 * 24 {
			time.Sleep(time.Hour)
			if left := time.Until(i.NotAfter()); left < 9*time.Hour {
				t.Fatalf("%s left", left)
			}
		}
		stop()
		// A renewal every 12 to 14.4 hours, after the enrolment.
		if p.calls < 1+240/15 || p.calls > 1+240/12 {
			t.Errorf("%d calls in 10 days", p.calls)
		}
		wantFresh(t, p, cfg, i)
	})
}

// wantFresh checks that no key was used twice, and that i's certificate is the stored one.
func wantFresh(t *testing.T, p *plane, cfg Config, i *Identity) {
	t.Helper()
	keys := slices.Clone(p.keys)
	slices.Sort(keys)
	if len(slices.Compact(keys)) != len(p.keys) {
		t.Error("a key was used twice")
	}
	again := newDirect(t, p, cfg)
	ensure(t, again)
	if !again.NotAfter().Equal(i.NotAfter()) {
		t.Error("the newest certificate is not the stored one")
	}
}

func TestRenewalsAreSpread(t *testing.T) {
	p := newPlane(t)
	times := map[time.Duration]bool{}
	for range 20 {
		i := newDirect(t, p, testConfig(t, p))
		ensure(t, i)
		times[time.Until(i.due()).Round(time.Minute)] = true
	}
	if len(times) < 10 {
		t.Errorf("20 edges renew at %d different minutes", len(times))
	}
}

func TestRenewalIsTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		i := newDirect(t, p, testConfig(t, p))
		ensure(t, i)
		first := i.NotAfter()
		p.fail = func(int) error { return status.Error(codes.Unavailable, "down") }
		stop := run(t, i)
		defer stop()
		time.Sleep(23 * time.Hour)
		synctest.Wait()
		p.set(func() {
			// 8.6 to 11 hours with an attempt every half to whole minute.
			if p.calls < 500 || p.calls > 1400 {
				t.Errorf("%d calls", p.calls)
			}
			p.fail = nil
		})
		time.Sleep(2 * maxRenewDelay)
		synctest.Wait()
		if !i.NotAfter().After(first) {
			t.Error("not renewed")
		}
	})
}

// An outage that outlived the certificate ends with a new join token, without a
// restart.
func TestExpiredWhileRunning(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		cfg := testConfig(t, p)
		i := newDirect(t, p, cfg)
		ensure(t, i)
		p.fail = func(int) error { return status.Error(codes.Unavailable, "down") }
		stop := run(t, i)
		defer stop()
		time.Sleep(25 * time.Hour)
		synctest.Wait()
		calls := 0
		p.set(func() { calls, p.fail, p.tokens = p.calls, nil, nil })
		time.Sleep(time.Hour)
		synctest.Wait()
		p.set(func() {
			if p.calls != calls {
				t.Errorf("%d calls with a used token", p.calls-calls)
			}
			p.fail = func(int) error { return status.Error(codes.PermissionDenied, "no") }
		})
		writeToken(t, cfg.TokenFile, p.token("2"))
		time.Sleep(time.Hour)
		synctest.Wait()
		p.set(func() {
			if p.calls != calls+1 {
				t.Errorf("%d calls with a refused token", p.calls-calls)
			}
			p.fail = nil
		})
		writeToken(t, cfg.TokenFile, p.token("3"))
		time.Sleep(2 * maxRenewDelay)
		synctest.Wait()
		if left := time.Until(i.NotAfter()); left < 23*time.Hour {
			t.Errorf("%s left", left)
		}
		if want := []string{p.token("2"), p.token("3")}; !slices.Equal(p.tokens, want) {
			t.Errorf("sent %v, want %v", p.tokens, want)
		}
	})
}

// An edge that was away for long comes back by itself, as often as that happens, with
// a new key each time. A new token comes first.
func TestComeBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		cfg := testConfig(t, p)
		ensure(t, newDirect(t, p, cfg))
		p.grace = true
		back := func() *Identity {
			time.Sleep(48 * time.Hour)
			i := newDirect(t, p, cfg)
			wantError(t, i.Load(t.Context()), ErrExpired)
			stop := run(t, i)
			time.Sleep(2 * firstRenewDelay)
			synctest.Wait()
			stop()
			if left := time.Until(i.NotAfter()); left < 23*time.Hour {
				t.Fatalf("%s left", left)
			}
			return i
		}
		back()
		i := back()
		if p.back != 2 || len(p.tokens) != 1 {
			t.Errorf("came back %d times, with tokens %v", p.back, p.tokens)
		}
		wantFresh(t, p, cfg, i)
		writeToken(t, cfg.TokenFile, p.token("2"))
		back()
		if p.back != 2 || len(p.tokens) != 2 {
			t.Errorf("came back %d times, with tokens %v", p.back, p.tokens)
		}
	})
}

// An edge that may not come back says what to do.
func TestComeBackRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		cfg := testConfig(t, p)
		i := newDirect(t, p, cfg)
		ensure(t, i)
		time.Sleep(48 * time.Hour)
		wantError(t, i.tend(t.Context()), ErrExpired, "too late", "resealctl token create --id e1")
	})
}

// The same from a start with an expired certificate.
func TestRunAfterLoadOfExpired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		cfg := testConfig(t, p)
		ensure(t, newDirect(t, p, cfg))
		time.Sleep(48 * time.Hour)
		i := newDirect(t, p, cfg)
		wantError(t, i.Load(t.Context()), ErrExpired)
		stop := run(t, i)
		defer stop()
		writeToken(t, cfg.TokenFile, p.token("2"))
		time.Sleep(2 * maxRenewDelay)
		synctest.Wait()
		if left := time.Until(i.NotAfter()); left < 23*time.Hour {
			t.Errorf("%s left", left)
		}
	})
}

// A renewed certificate that can't be stored is used, and stored later.
func TestRenewalWithoutDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		cfg := testConfig(t, p)
		state := cfg.State.(*memory)
		i := newDirect(t, p, cfg)
		ensure(t, i)
		first := i.NotAfter()
		state.failWith(errors.New("disk full"))
		stop := run(t, i)
		defer stop()
		time.Sleep(15 * time.Hour)
		synctest.Wait()
		if !i.NotAfter().After(first) || p.calls != 2 {
			t.Errorf("until %s after %d calls", i.NotAfter(), p.calls)
		}
		state.failWith(nil)
		time.Sleep(2 * maxRenewDelay)
		synctest.Wait()
		again := newDirect(t, p, cfg)
		ensure(t, again)
		if !again.NotAfter().Equal(i.NotAfter()) || p.calls != 2 {
			t.Errorf("stored until %s, used until %s, %d calls", again.NotAfter(), i.NotAfter(), p.calls)
		}
	})
}

func TestRenewalWithUnusableAnswer(t *testing.T) {
	p := newPlane(t)
	i := newDirect(t, p, testConfig(t, p))
	ensure(t, i)
	before := i.NotAfter()
	other := newPlane(t)
	i.connect = direct{p: other}.connect
	p.ttl, other.trustDomain = time.Hour, "elsewhere"
	if err := i.tend(t.Context()); !errors.Is(err, ErrRecord) {
		t.Errorf("error is %v", err)
	}
	if i.NotAfter() != before {
		t.Error("it is used all the same")
	}
}

func TestRunBeforeEnsure(t *testing.T) {
	p := newPlane(t)
	if err := newDirect(t, p, testConfig(t, p)).Run(t.Context()); !errors.Is(err, ErrNotEnrolled) {
		t.Error(err)
	}
}
