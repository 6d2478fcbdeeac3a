package link

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/status"

	"github.com/reseal/reseal/edge/exchange"
)

const (
	backoffBase = 100 * time.Millisecond
	backoffMax  = 10 * time.Second
	// goodStream is how long a stream must live for the next to be tried soon.
	goodStream = 10 * time.Second
	// maxRetryAfter bounds what the control plane can ask for.
	maxRetryAfter = time.Minute
)

// Keep calls serve, which runs one stream to its end, again and again until ctx
// ends. After an error it waits first, and lost hears how long: longer with each
// failure in a row, spread, so that a fleet does not come back all at once, and no
// less than the control plane asks for (google.rpc.RetryInfo, up to a minute).
// After a nil, or ErrLost, it calls serve at once. A panic of serve is an error.
func Keep(ctx context.Context, serve func(context.Context) error, lost func(err error, again time.Duration)) {
	for failures := 0; ; failures++ {
		started := time.Now()
		err := exchange.Guard("a conversation with the control plane went on", func() error { return serve(ctx) })
		if ctx.Err() != nil {
			return
		}
		if time.Since(started) >= goodStream {
			failures = 0
		}
		if err == nil {
			failures = -1
			continue
		}
		if errors.Is(err, ErrLost) {
			failures-- // it is the link that waits, and whatever is said on it for that
			lost(err, 0)
			continue
		}
		delay := max(wait(failures), retryAfter(err))
		lost(err, delay)
		timer := time.NewTimer(delay)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return
		}
	}
}

// wait is how long to wait after that many failures in a row.
func wait(failures int) time.Duration {
	limit := backoffMax
	if failures < 7 {
		limit = min(limit, backoffBase<<failures)
	}
	return limit/2 + rand.N(limit)/2
}

// retryAfter is what the control plane asks for, and up to half as much again, 0
// when it asks for nothing.
func retryAfter(err error) time.Duration {
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.RetryInfo); ok && info.GetRetryDelay().CheckValid() == nil {
			asked := min(max(info.GetRetryDelay().AsDuration(), 0), maxRetryAfter)
			return asked + rand.N(asked/2+1)
		}
	}
	return 0
}
