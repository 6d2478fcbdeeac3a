package link

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// waits are the times between the calls of serve, each of which returns the next
// of outcomes after the stream has lived for a while.
func waits(t *testing.T, lived time.Duration, outcomes []error) (all []time.Duration) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var ended time.Time
		calls := 0
		Keep(ctx, func(context.Context) error {
			if calls > 0 {
				all = append(all, time.Since(ended))
			}
			if calls == len(outcomes) {
				cancel()
				return nil
			}
			time.Sleep(lived)
			ended = time.Now()
			calls++
			return outcomes[calls-1]
		}, func(error, time.Duration) {})
	})
	return all
}

func repeat(err error, n int) []error {
	var all []error
	for range n {
		all = append(all, err)
	}
	return all
}

func busy(delay time.Duration) error {
	full, _ := status.New(codes.ResourceExhausted, "full").WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(delay)})
	return full.Err()
}

func TestKeep(t *testing.T) {
	failure := errors.New("broken")
	t.Run("waits longer with each failure", func(t *testing.T) {
		for i, wait := range waits(t, 0, repeat(failure, 120)) {
			limit := 10 * time.Second
			if i < 7 {
				limit = 100 * time.Millisecond << i
			}
			if wait < limit/2 || wait > limit {
				t.Errorf("the wait after %d failures is %s", i+1, wait)
			}
		}
	})
	t.Run("begins anew after a good stream", func(t *testing.T) {
		for _, wait := range waits(t, time.Minute, repeat(failure, 20)) {
			if wait > 100*time.Millisecond {
				t.Errorf("the wait after a stream of a minute is %s", wait)
			}
		}
	})
	t.Run("does not wait after nil", func(t *testing.T) {
		for i, wait := range waits(t, 0, append(repeat(failure, 5), nil, failure)) {
			if i == 5 && wait != 0 || i == 6 && wait > 100*time.Millisecond {
				t.Errorf("wait %d is %s", i, wait)
			}
		}
	})
	t.Run("waits as long as it is asked", func(t *testing.T) {
		for _, test := range []struct{ asked, least, most time.Duration }{
			{30 * time.Second, 30 * time.Second, 45 * time.Second},
			{time.Hour, time.Minute, 90 * time.Second},
			{-time.Hour, 50 * time.Millisecond, 100 * time.Millisecond},
		} {
			spread := map[time.Duration]bool{}
			for range 10 {
				wait := waits(t, 0, []error{busy(test.asked)})[0]
				spread[wait] = true
				if wait < test.least || wait > test.most {
					t.Errorf("asked for %s it waits %s", test.asked, wait)
				}
			}
			if len(spread) < 2 {
				t.Errorf("asked for %s all wait equally long", test.asked)
			}
		}
	})
}
