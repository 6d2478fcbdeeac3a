package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// format is how results are written.
type format struct {
	value   string
	allowed []string
}

// registerFormat adds -o to a command. The first of allowed is the default.
func registerFormat(cmd *cobra.Command, allowed ...string) *format {
	f := &format{value: allowed[0], allowed: allowed}
	cmd.Flags().VarP(f, "output", "o", "one of "+strings.Join(allowed, ", "))
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(allowed, cobra.ShellCompDirectiveNoFileComp))
	return f
}

func (f *format) String() string { return f.value }
func (f *format) Type() string   { return "format" }

func (f *format) Set(value string) error {
	if !slices.Contains(f.allowed, value) {
		return fmt.Errorf("want one of %s", strings.Join(f.allowed, ", "))
	}
	f.value = value
	return nil
}

// structured says whether the output is a document for programs.
func (f *format) structured() bool { return f.value == "json" || f.value == "yaml" }

// printDocument writes v, whose json tags count, as JSON or YAML.
func (a *app) printDocument(f *format, v any) error {
	var data bytes.Buffer
	encoder := json.NewEncoder(&data)
	encoder.SetEscapeHTML(false)
	encoder.SetIndent("", "  ")
	if err := encoder.Encode(v); err != nil {
		return err
	}
	if f.value == "json" {
		return a.writeJSON(data.Bytes())
	}
	return writeJSONAsYAML(a.out, data.Bytes())
}

// writeJSONAsYAML keeps the order of the fields.
func writeJSONAsYAML(w io.Writer, data []byte) error {
	var node yaml.Node
	// YAML does not allow all characters that JSON does, but their escapes.
	if err := yaml.Unmarshal([]byte(resealv1.VisibleLines(string(data))), &node); err != nil {
		return err
	}
	plainStyle(&node)
	encoder := yaml.NewEncoder(w)
	encoder.SetIndent(2)
	if err := encoder.Encode(&node); err != nil {
		return err
	}
	return encoder.Close()
}

// plainStyle turns JSON's flow style and quotes into YAML's usual style. Empty
// collections have no other style than flow.
func plainStyle(node *yaml.Node) {
	if len(node.Content) > 0 || node.Kind == yaml.ScalarNode {
		node.Style = 0
	}
	if node.Kind == yaml.ScalarNode && resealv1.VisibleLines(node.Value) != node.Value {
		node.Style = yaml.DoubleQuotedStyle // where escapes mean what they stand for
	}
	for _, child := range node.Content {
		plainStyle(child)
	}
}

// separateDocuments writes what stands between two documents of a stream.
func (a *app) separateDocuments(f *format) {
	if f.value == "yaml" {
		a.printf("---\n")
	}
}
