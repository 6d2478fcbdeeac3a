package main

import (
	"bytes"
	"encoding/json"
	"io"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// evil steers a terminal in all the ways there are: C0, DEL, C1, the direction of
// writing, and beyond 16 bits.
const evil = "\x1b]0;owned\a\x1b[2J\r\x7f\u009b31m\u202e\U000e0041"

// spoil makes every text in m evil.
func spoil(m protoreflect.Message) {
	m.Range(func(field protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		switch {
		case field.IsMap():
			entries := map[string]protoreflect.Value{}
			value.Map().Range(func(key protoreflect.MapKey, v protoreflect.Value) bool {
				entries[key.String()] = v
				return true
			})
			for key, v := range entries {
				value.Map().Clear(protoreflect.ValueOfString(key).MapKey())
				value.Map().Set(protoreflect.ValueOfString(key+evil).MapKey(), v)
			}
		case field.IsList() && field.Kind() == protoreflect.StringKind:
			for i := range value.List().Len() {
				value.List().Set(i, protoreflect.ValueOfString(value.List().Get(i).String()+evil))
			}
		case field.IsList() && field.Message() != nil:
			for i := range value.List().Len() {
				spoil(value.List().Get(i).Message())
			}
		case field.Message() != nil:
			spoil(value.Message())
		case field.Kind() == protoreflect.StringKind:
			m.Set(field, protoreflect.ValueOfString(value.String()+evil))
		}
		return true
	})
}

// TestOutputIsVisible: whatever edges say, no command lets it steer the terminal,
// and documents still say the same.
func TestOutputIsVisible(t *testing.T) {
	f := newFake(t)
	f.change(func() {
		for _, m := range []proto.Message{f.stats, f.edges[0], f.edges[1]} {
			spoil(m.ProtoReflect())
		}
	})
	check := func(s *session, args []string) {
		t.Helper()
		for _, text := range []string{s.out.String(), s.err.String()} {
			if text != resealv1.VisibleLines(text) {
				t.Errorf("%v wrote %q", args, text)
			}
		}
	}
	for _, args := range [][]string{
		{"get", "edges"}, {"get", "edges", "-o", "wide"}, {"get", "edges", "-o", "name"}, {"describe", "edge", "edge-1" + evil}, {"stats"}, {"top"},
		{"describe", "edge", "edge-2" + evil}, {"__complete", "describe", "edge", ""},
	} {
		s := start(t, f, false, "", args...)
		s.ends(0)
		check(s, args)
		if !strings.Contains(s.out.String(), `\x1b]0;owned\x07`) {
			t.Errorf("%v does not show what there is: %q", args, s.out)
		}
	}
	for _, args := range [][]string{{"get", "edge", "no" + evil}, {"drain", "no" + evil}, {"stats", evil}, {evil}, {"--" + evil}} {
		s := start(t, f, false, "", args...)
		if code := <-s.exit; code == 0 {
			t.Errorf("%v succeeded", args)
		}
		check(s, args)
	}
	for _, args := range [][]string{{"get", "edges"}, {"stats"}} {
		for format, decode := range map[string]func([]byte, any) error{"json": json.Unmarshal, "yaml": yaml.Unmarshal} {
			args := append(args, "-o", format)
			s := start(t, f, false, "", args...)
			s.ends(0)
			check(s, args)
			var document any
			if err := decode(s.out.data.Bytes(), &document); err != nil {
				t.Errorf("%v: %v", args, err)
			}
			if again, _ := json.Marshal(document); !bytes.Contains(again, mustJSON("edge-1"+evil)) && !bytes.Contains(again, mustJSON("jetty"+evil+evil)) {
				t.Errorf("%v lost what the edge said: %s", args, again)
			}
		}
	}
}

func mustJSON(text string) []byte {
	data, _ := json.Marshal(text)
	return data
}

// TestSteer: only what this command itself says steers the terminal.
func TestSteer(t *testing.T) {
	var out bytes.Buffer
	w := &visibleWriter{&out}
	steer(w, "\r\x1b[K")
	if n, err := io.WriteString(w, evil); n != len(evil) || err != nil {
		t.Fatalf("wrote %d, %v", n, err)
	}
	if want := "\r\x1b[K" + resealv1.Visible(evil); out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
}
