package feed

import (
	"context"
	"errors"
	"testing"
	"time"
)

// TestPauseWaitsForAnApply: while a hand-over is under way nothing is applied.
func TestPauseWaitsForAnApply(t *testing.T) {
	f := New(Config{Edge: "e", BootID: "b", State: &memory{}})
	f.applying <- struct{}{}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := f.Pause(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	<-f.applying
	if data, err := f.Pause(t.Context()); data != nil || err != nil {
		t.Errorf("%q, %v without a configuration", data, err)
	}
	select {
	case f.applying <- struct{}{}:
		t.Error("an apply goes on")
	default:
	}
	f.Resume(true)
	if err := f.Inherit(t.Context(), []byte("damaged")); !errors.Is(err, ErrLastGood) {
		t.Errorf("got %v", err)
	}
}
