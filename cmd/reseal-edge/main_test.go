package main

import (
	"io"
	"maps"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestParseLabels(t *testing.T) {
	for text, want := range map[string]map[string]string{
		"":              {},
		"zone=eu":       {"zone": "eu"},
		"zone=eu,tier=": {"zone": "eu", "tier": ""},
		"a=b=c":         {"a": "b=c"},
	} {
		if got, err := parseLabels(text); err != nil || !maps.Equal(got, want) {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
	for _, text := range []string{"zone", "=eu"} {
		if got, err := parseLabels(text); err == nil {
			t.Errorf("%q: %v, no error", text, got)
		}
	}
}

func TestUsage(t *testing.T) {
	for _, test := range []struct {
		args []string
		says string
	}{
		{nil, "--id and --control-plane are required"},
		{[]string{"--id", "a", "--control-plane", "x:1", "--labels", "zone"}, "not of the form k=v"},
		{[]string{"--id", "a", "--control-plane", "x:1", "--admin", "0.0.0.0:0", "--access-log", ""}, "--insecure-admin"},
		{[]string{"--id", "a", "--control-plane", "x:1", "--access-log", "/nonexistent/dir/log"}, "--access-log"},
	} {
		var out strings.Builder
		if code := run(test.args, io.Discard, &out); code != 2 || !strings.Contains(out.String(), test.says) {
			t.Errorf("%v: code %d, %s", test.args, code, out.String())
		}
	}
}
