package exchange

import (
	"errors"
	"strings"
	"testing"
)

func fails(reason any) error { panic(reason) }

// A panic is told with what it was and where it happened, and no more than is worth
// telling.
func TestBug(t *testing.T) {
	bug := &Bug{}
	if err := Guard("a plan was made", func() error { return fails("no such pool") }); !errors.As(err, &bug) {
		t.Fatalf("got %v", err)
	}
	if bug.During != "a plan was made" || bug.Reason != "no such pool" || !strings.HasPrefix(bug.Stack, "edge/exchange.fails (bug_test.go:") {
		t.Errorf("got %+v", bug)
	}
	var nothing *Bug
	err := Guard("reading", func() error { return errors.New(nothing.Reason) })
	if !errors.As(err, &bug) || !strings.Contains(bug.Reason, "nil pointer") || !strings.HasPrefix(bug.Stack, "edge/exchange.TestBug") {
		t.Errorf("got %v", err)
	}
}

func TestBugIsBounded(t *testing.T) {
	var deep func(n int) error
	deep = func(n int) error {
		if n == 0 {
			return fails(strings.Repeat("ä", 10_000))
		}
		return deep(n - 1)
	}
	err := Guard("falling", func() error { return deep(100) })
	if text := err.Error(); len(text) > 1500 || strings.Count(text, "deep") > 0 && strings.Count(text, " < ") != maxBugFrames-1 {
		t.Errorf("%d bytes: %s", len(text), text)
	}
}

func TestGuardPassesErrorsOn(t *testing.T) {
	want := errors.New("no")
	if err := Guard("asking", func() error { return want }); !errors.Is(err, want) {
		t.Errorf("got %v", err)
	}
	if err := Guard("asking", func() error { return nil }); err != nil {
		t.Errorf("got %v", err)
	}
}
